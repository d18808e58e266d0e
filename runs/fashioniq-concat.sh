#!/bin/sh
# Published (README). Other flags may follow, as --dataset_path DIR; the last of two counts.
# It wants a sentence service: python bert_server.py --model_dir bert-base-uncased
cd "$(dirname "$0")/.." && exec "${PYTHON:-python}" -W ignore main.py --dataset=fashionIQ --dataset_path=../data/fashionIQ/ \
	--model=RealSpaceConcatAE --loss=batch_based_classification --learning_rate_decay_frequency=8000 --num_iters=100000 \
	--use_bert True --use_complete_text_query True --comment=fashionIQ_RealSpaceConcatAE --log_dir ../logs/fashionIQ/ "$@"
