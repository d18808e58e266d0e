#!/bin/sh
# Published (README). Other flags may follow, as --dataset_path DIR; the last of two counts.
# It wants a sentence service: python bert_server.py --model_dir bert-base-uncased
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -W ignore main.py --dataset=mitstates --dataset_path=../data/mitstates/ \
	--model=tirg --loss=soft_triplet --learning_rate_decay_frequency=50000 --num_iters=160000 --weight_decay=5e-5 \
	--comment=mitstates_tirg_bert --log_dir ../logs/mitstates/ --use_bert True "$@"
