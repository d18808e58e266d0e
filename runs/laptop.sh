#!/bin/sh
# runs/laptop.sh DATASET DIR: a strong model in minutes without a GPU. A frozen ImageNet encoder's features and a sentence
# encoder's vectors, both computed once and kept in DIR/image_cache; what learns is the last layer, words beside the
# sentences, and the composer. What these settings gave on photographs and artwork: docs/results.md, "Features of several
# depths, words that learn" (at 128 pixels; here the encoder's own size, 224).
[ $# -ge 2 ] || { echo "usage: runs/laptop.sh DATASET DIR [main.py's flags]" >&2; exit 2; }
dataset="$1" path="$2"; shift 2
exec "${PYTHON:-python}" "$(dirname "$0")/../main.py" --dataset "$dataset" --dataset_path "$path" --model TransformerAE \
	--loss caption_aware_classification --freeze_image_encoder True --image_encoder timm:tf_efficientnet_lite0 \
	--image_features stages --feature_dropout 0.25 --text_encoder hf:sentence-transformers/all-MiniLM-L6-v2 \
	--learn_words True --num_iters 600 --batch_size 128 --learning_rate 0.03 --schedule cosine --warmup 100 \
	--validation 0.1 --eval_frequency 0 --baselines True --log_dir logs "$@"
