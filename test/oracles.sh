#!/bin/sh
# Writes the small canonical oracles into a directory: a model of each kind, and each op alone.
# Usage: sh test/oracles.sh REF_CPU DIRECTORY (make oracles)
set -eu
ref_cpu=$1
out=$2
mkdir -p "$out"

# oracle NAME OPTIONS...
oracle() {
    name=$1
    shift
    "$ref_cpu" oracle --out "$out/$name.safetensors" "$@"
}

# T is not a multiple of Q, N != P, and a vocabulary that is not a multiple of 8, in all of them.
small="--layers 3 --d-model 32 --heads 4 --d-state 12 --d-ff 40 --vocab 37 --chunk 8 --seq-len 19 --attn-period 3 --attn-offset 1"
oracle hybrid       $small --tie false
oracle tied         $small --tie true --kv-heads 2
oracle gqa          $small --tie false --kv-heads 2
oracle transformer  $small --tie false --attn-period 1 --attn-offset 0
oracle ssm          $small --tie false --attn-period 0 --layers 2
oracle one-head     $small --tie false --heads 1 --d-model 10 --d-state 16
oracle no-decay     $small --tie true --ssd-decay false
oracle exact-chunks $small --tie true --seq-len 16 --d-state 8
oracle short        $small --tie true --seq-len 5
oracle loss-only    $small --tie true --state-cotangent false

op="--batch 2 --seq-len 19 --heads 4 --kv-heads 2 --head-dim 8 --d-state 12 --d-ff 40 --vocab 37 --chunk 8"
for name in ssd attention rmsnorm rope linear embedding swiglu residual cross_entropy; do
    oracle "op-$name" --op $name $op
done
