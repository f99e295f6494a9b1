#!/usr/bin/env bash
# The paper's Tables 1 to 4, 6, 11 and 12 for one model, command by command, with random skipping and the dense model.
#
#   paper/reproduce.sh llama-3.2-1b --dry-run     # which models and data sets can be had, and what would be run
#   paper/reproduce.sh llama-3.2-1b               # llama-3.2-3b, llama-3.1-8b, gemma-2-2b (Table 6),
#                                                 # llama-3.2-3b-instruct (Table 3, deeper budgets, and nothing else)
#
# NOT RUN YET on a GPU, for want of one: only at toy size, by tests/test_reproduce.py. What is there is not made again:
# the same command goes on. One H100, float32; memory in training by train.py --dry-run, hours by arithmetic (15,493
# steps of some 400 tokens, and tables 1 to 4 about 25 M tokens a budget, at 25 TFLOP/s). Memory in evaluation is
# counted, not run: weights and gates, keys and values (2 x layers x heads of them x their width x 4 bytes) of a batch
# of rows of 2,054 tokens, 1,024 of them new, and one block's states of its prompts. Batches of 128, the authors', fit
# only the smallest; the quantile ranks a batch, so only rows of one batch size compare.
#
#                           hours of training   of evaluation   GB in training              in evaluation (batch)
#   llama-3.2-1b            6                   20              44 at 4,096 tokens, fewer   46 (128)
#   llama-3.2-3b            14                  50              73          as they come    59 (64)
#   llama-3.2-3b-instruct   4                   2               73                          59 (64)
#   llama-3.1-8b            28                  110             65, backbone frozen         64 (32)
#   gemma-2-2b              12                  40              69                          59 (64)
#
# For other sizes: TRAIN="--steps 10" EVALUATE="--limit 5" DATA=folder RUNS=folder MODEL=folder paper/reproduce.sh ...
set -euo pipefail
from_here() { case $1 in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
RUNS=${RUNS:+$(from_here "$RUNS")} DATA=${DATA:+$(from_here "$DATA")} TRAIN=${TRAIN:-} EVALUATE=${EVALUATE:-}
[ ! -e "${MODEL:-}" ] || MODEL=$(from_here "$MODEL")
cd "$(dirname "$0")/.."
NAME=${1:-} DRY=${2:-} RUNS=${RUNS:-runs/paper} DATA=${DATA:-data/paper}
[ $# -le 2 ] || { echo "error: $3: one model, then maybe --dry-run" >&2; exit 1; }
LIKE=$NAME BATCH=64 END=0.8 LESS="0.95 0.9 0.85 0.8 0.75"
GENERATED="generative mmlu_gen piqa_gen" OTHERS="loglikelihood lambada wmt16_en_ro"
case $NAME in
    llama-3.2-1b) HUB=meta-llama/Llama-3.2-1B BATCH=128 ;;
    llama-3.2-3b) HUB=meta-llama/Llama-3.2-3B ;;
    llama-3.2-3b-instruct) HUB=meta-llama/Llama-3.2-3B-Instruct LIKE=llama-3.2-3b GENERATED=generative OTHERS=
                           END=0.5 LESS="0.9 0.8 0.7 0.6 0.5" ;;      # 45% saved lies between two of them
    llama-3.1-8b) HUB=meta-llama/Llama-3.1-8B BATCH=32 ;;
    gemma-2-2b)   HUB=google/gemma-2-2b ;;
    *) echo "error: give llama-3.2-1b, llama-3.2-3b, llama-3.2-3b-instruct, llama-3.1-8b or gemma-2-2b, then maybe" \
            "--dry-run" >&2; exit 1 ;;
esac
case $DRY in "" | --dry-run) ;; *) echo "error: $DRY: only --dry-run may follow the model" >&2; exit 1 ;; esac
MODEL=${MODEL:-$HUB} OUT=$RUNS/$NAME

step() {                                      # step MADE COMMAND...: nothing if the file MADE is there already
    local made=$1; shift
    if [ -n "$DRY" ]; then printf '%q ' "$@"; echo
    elif [ -e "$made" ]; then echo "there: $made"
    else echo "+ $*"; "$@"; fi
}
trained() {                                   # trained NAME FLAGS...: a run in $OUT, gone on with if it was stopped
    local run=$OUT/$1; shift
    [ ! -e "$run/latest" ] || set -- "$@" --resume
    step "$run.done" python train.py "$@" --out "$run"
    [ -n "$DRY" ] || touch "$run.done"
}
evaluated() {                                 # evaluated NAME MODEL TASKS BUDGETS FLAGS...: results in $OUT
    local name=$1 model=$2 tasks=$3 budgets=$4; shift 4
    step "$OUT/$name.done" python paper/evaluate.py --model "$model" --tasks $tasks --budgets $budgets --data "$DATA" \
        --batch-size $BATCH --out "$OUT/$name.json" "$@" $EVALUATE
    [ -n "$DRY" ] || touch "$OUT/$name.done"
}

MISSING=0
if [ -n "$DRY" ]; then
    python paper/can_be_had.py --model "$MODEL" --data "$DATA" --training-data \
        --tasks $GENERATED $OTHERS || MISSING=1
    echo
else
    mkdir -p "$OUT" "$DATA"
    asked="MODEL=$MODEL TRAIN=$TRAIN EVALUATE=$EVALUATE"
    [ -e "$OUT/settings" ] || echo "$asked" > "$OUT/settings"
    [ "$(cat "$OUT/settings")" = "$asked" ] || {
        echo "error: $OUT was begun with $(cat "$OUT/settings"), now $asked: give another RUNS" >&2; exit 1; }
fi

# data: traces (Table 14), web text for the hour of training before log-likelihoods, translations
step "$DATA/traces.jsonl" python paper/training_data.py traces --out "$DATA/traces.jsonl"
if [ -n "$OTHERS" ]; then
    step "$DATA/fineweb.jsonl" python paper/training_data.py fineweb --n 50000 --out "$DATA/fineweb.jsonl"
    step "$DATA/wmt16.jsonl" python paper/training_data.py wmt16 --n 100000 --out "$DATA/wmt16.jsonl"
fi

# training: Table 15; one seed of the paper's five (TRAIN="--seed 2" RUNS=runs/paper-2 for the next)
PRESET=(--preset "$LIKE" --model "$MODEL")
trained traces "${PRESET[@]}" --data "$DATA/traces.jsonl" --budget-end $END $TRAIN
TUNED=$OUT/traces-dense                       # 8B: its preset freezes the backbone, so the dense model is the untuned
if [ "$NAME" = llama-3.1-8b ]; then TUNED=$MODEL; else
    trained traces-dense "${PRESET[@]}" --gate none --data "$DATA/traces.jsonl" $TRAIN
fi
if [ -n "$OTHERS" ]; then
    trained fineweb "${PRESET[@]}" --data "$DATA/fineweb.jsonl" --seq-len 512 --batch-size 8 --steps 6000 \
        --budget-end 0.4 $TRAIN
    trained wmt16 "${PRESET[@]}" --data "$DATA/wmt16.jsonl" $TRAIN
fi

# Tables 1, 2, 3 and 6: generated answers; Table 4: two more tasks of them
evaluated generated "$OUT/traces" "$GENERATED" "1.0 $LESS" --selector batch --max-new-tokens 1024
evaluated generated-random "$TUNED" generative "$LESS" --selector random --max-new-tokens 1024
evaluated generated-dense "$TUNED" "$GENERATED" 1.0 --max-new-tokens 1024
[ -n "$OTHERS" ] || exit $MISSING
# Tables 1 and 2: log-likelihoods, five examples each; random on the untuned model: no dense one is tuned on that text
evaluated scored "$OUT/fineweb" loglikelihood "1.0 0.85 0.7 0.55 0.4" --selector batch --shots 5
evaluated scored-random "$MODEL" loglikelihood "0.85 0.7 0.55 0.4" --selector random --shots 5
evaluated scored-dense "$MODEL" loglikelihood 1.0 --shots 5
# the authors' job scripts give no examples: which setting are Table 2's figures of?
evaluated scored-zero "$OUT/fineweb" loglikelihood 1.0 --shots 0
evaluated scored-zero-dense "$MODEL" loglikelihood 1.0 --shots 0
# Tables 11 and 12
evaluated lambada "$OUT/fineweb" lambada "1.0 0.9 0.8 0.7" --selector batch
evaluated lambada-dense "$MODEL" lambada 1.0
evaluated translated "$OUT/wmt16" wmt16_en_ro "1.0 $LESS" --selector batch
exit $MISSING
