#!/bin/sh
# runs/laptop.sh DATASET DIR: a strong model in minutes without a GPU. A frozen ImageNet encoder and BERT's sentence
# vectors, both computed once and kept in DIR/image_cache; what learns is the last layer and the composer. What these
# settings gave on real artwork: docs/results.md, "Larger batches" (at 128 pixels; here the encoder's own size, 224).
[ $# -ge 2 ] || { echo "usage: runs/laptop.sh DATASET DIR [main.py's flags]" >&2; exit 2; }
dataset="$1" path="$2"; shift 2
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset "$dataset" --dataset_path "$path" --model TransformerAE \
	--loss batch_based_classification --freeze_image_encoder True --image_encoder timm:tf_efficientnet_lite0 \
	--text_encoder hf:sentence-transformers/all-MiniLM-L6-v2 --num_iters 600 --batch_size 128 --learning_rate 0.03 \
	--schedule cosine --warmup 100 --validation 0.1 --eval_frequency 0 --baselines True --log_dir logs "$@"
