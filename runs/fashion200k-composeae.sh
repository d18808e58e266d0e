#!/bin/sh
# Published (README). Other flags may follow, as --dataset_path DIR; the last of two counts.
# It wants a sentence service: python bert_server.py --model_dir bert-base-uncased
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -W ignore main.py --dataset=fashion200k --dataset_path=../data/fashion200k/ \
	--model=composeAE --loss=batch_based_classification --learning_rate_decay_frequency=50000 --num_iters=160000 \
	--use_bert True --use_complete_text_query True --weight_decay=5e-5 --comment=fashion200k_composeAE \
	--log_dir ../logs/fashion200k/ "$@"
