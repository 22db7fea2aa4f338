#!/usr/bin/env bash
# 100 steps on the four devices of a card, 16 images on each, with DATA the folder of CIFAR-10 and WEIGHTS the file of
# weights. run_vit.py writes sdaa.log and, where cuda.log lies beside it, calls loss.py, which draws loss.jpg.
set -eo pipefail
cd "$(dirname "$0")"
pip install -r ../requirements.txt
python run_vit.py --model_name vit --nproc_per_node 4 --bs 16 --lr 0.03 --device sdaa --step 100 \
    --dataset cifar10 --dataset_path "${DATA:-data}" --pretrained_dir "${WEIGHTS:-checkpoint/ViT-B_16.npz}" \
    --autocast True --grad_scale True --compile True 2>&1 | tee test.log
