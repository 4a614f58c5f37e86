#!/bin/sh
# Plants one mistake at a time in a copy of ref_cpu.cpp and checks two things: that the layer and model tests fail, and that
# `ref_cpu compare`, given what the wrong code computes in fp32, names the very tensor where the mistake was planted as the
# first that differs. A suite that cannot fail proves nothing, and neither does an oracle that does not point.
# Usage: sh test/mutations.sh (make mutations). Needs the objects of `make test` and the program ref_cpu.
set -eu
cd "$(dirname "$0")/.."
CXX=${CXX:-g++}
BUILD=${BUILD:-build}
REF_CPU=${REF_CPU:-./ref_cpu}
FLAGS="-std=c++17 -O1 -ffp-contract=off -w -I. -DREF_CPU_MAIN -Dmain=ref_cpu_main"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tests="$BUILD/test/main.o $BUILD/test/test_layers.o $BUILD/test/test_model.o $BUILD/tokenizer.o"
for o in $tests; do
    [ -e "$o" ] || { echo "$o is missing: run 'make test' first"; exit 1; }
done
link="$(grep -q -- -fopenmp "$BUILD/flags" && echo -fopenmp || true)"

# Everything in one small oracle: three layers of both kinds, grouped heads, N != P, a ragged last chunk, a tied head.
oracle="$work/oracle.safetensors"
$REF_CPU oracle --out "$oracle" --layers 3 --d-model 32 --heads 4 --kv-heads 2 --d-state 12 --d-ff 40 --vocab 37 --chunk 8 \
    --seq-len 19 --attn-period 3 --attn-offset 1 --tie true >/dev/null
# With -Dmain=ref_cpu_main one object serves the tests and the program.
echo 'int ref_cpu_main(int, char**); int main(int n, char** words) { return ref_cpu_main(n, words); }' >"$work/main.cpp"
$CXX -O1 -c -o "$work/main.o" "$work/main.cpp"

# check DIR: builds DIR/ref_cpu.cpp; DIR/tests has the tests' result, DIR/first the first tensor that differs
check() {
    $CXX $FLAGS -c -o "$1/ref_cpu.o" "$1/ref_cpu.cpp"
    $CXX $link -o "$1/tests.exe" $tests "$1/ref_cpu.o" ${CUDA_LINK:-}
    $CXX $link -o "$1/ref_cpu.exe" "$work/main.o" "$1/ref_cpu.o" "$BUILD/tokenizer.o"
    if "$1/tests.exe" >"$1/tests.log" 2>&1; then echo pass; else echo fail; fi >"$1/tests"
    "$1/ref_cpu.exe" oracle --inputs "$oracle" --precision fp32 --out "$1/candidate" >/dev/null
    $REF_CPU compare "$oracle" "$1/candidate" >"$1/compare.log" || true
    { sed -n 's/^FIRST DIFFERENCE: \([^ ]*\).*/\1/p' "$1/compare.log"; echo none; } | head -1 >"$1/first"
}

mkdir "$work/0"
cp ref_cpu.cpp "$work/0/ref_cpu.cpp"
check "$work/0"
if [ "$(cat "$work/0/tests")" != pass ] || ! grep -q ' 0 differ, 0 missing;' "$work/0/compare.log"; then
    cat "$work/0/tests.log" "$work/0/compare.log"
    echo "the unchanged code fails"
    exit 1
fi
echo "unchanged: the tests pass, the oracle agrees"

# mutate TITLE TENSOR SED-EXPRESSION: TENSOR must be the first that differs
count=0
mutate() {
    count=$((count + 1))
    dir="$work/$count"
    mkdir "$dir"
    echo "$1" >"$dir/title"
    echo "$2" >"$dir/expected"
    sed "$3" ref_cpu.cpp >"$dir/ref_cpu.cpp"
    if cmp -s ref_cpu.cpp "$dir/ref_cpu.cpp"; then
        echo "the expression matches nothing any more" >"$dir/problem"
        return
    fi
    check "$dir" &
    [ $((count % 2)) -eq 1 ] || wait
}

mutate "sign of A"                     layers.0.ssd.dA        's/decay ? -std::exp(A_log\[h\])/decay ? std::exp(A_log[h])/'
mutate "exclusive cumulative sum"      layers.0.ssd.cs        's/cs\[t \* cs_stride\] = running += dA\[t \* dA_stride\];/{ cs[t * cs_stride] = running; running += dA[t * dA_stride]; }/'
mutate "interleaved RoPE pairs"        layers.0.ssd.C         's/T \*lo = x + r \* ld + h \* table.d, \*hi = lo + half;/T *lo = x + r * ld + h * table.d, *hi = lo + 1;/'
mutate "dt applied twice"              layers.0.ssd.state_in  's/k.tmp\[size_t(s \* n.P + p)\] = k.to_end\[size_t(s)\] \* step/k.tmp[size_t(s * n.P + p)] = step[s * n.H] * k.to_end[size_t(s)] * step/'
mutate "order of grouped heads"        layers.1.attn.lse      's/for (int64 h = hkv \* group; h < (hkv + 1) \* group; ++h)/for (int64 h = hkv; h < n.H; h += n.Hkv)/'
mutate "no 1/sqrt(P)"                  layers.1.attn.lse      's/const T scale = T(1.0 \/ std::sqrt(double(n.P)));/const T scale = T(1);/'
mutate "epsilon of the norm, 1e-5"     layers.0.norm1         's/T(D) + T(eps));/T(D) + T(10 * eps));/'
mutate "state read before its update"  decode.split_1.after_1.layers.0.y \
    's/dot_rows(y + p, C, S + p \* n.N, n.N, std::min(kDotRows, n.P - p), n.N);/for (int64 k = p; k < std::min(p + kDotRows, n.P); ++k) y[k] = dot(S + k * n.N, C, n.N) - step * X[k] * dot(Bt, C, n.N);/'
mutate "position off by one in decode" decode.split_1.after_2.layers.0.ssm_state \
    's/const int64 pos0 = state ? state->position : 0;/const int64 pos0 = state \&\& state->position ? state->position - 1 : 0;/'
mutate "residual weight on the branch" layers.0.residual1     's/out\[r \* D + d\] = w\[d\] \* x\[r \* D + d\] + m\[r \* D + d\];/out[r * D + d] = x[r * D + d] + w[d] * m[r * D + d];/'
mutate "tied gradient missing"         grad.model.word_embed.weight \
    's/embedding_backward(g(Param::word_embed), dx, tokens.data(), rows, D);/if (!c.tie) embedding_backward(g(Param::word_embed), dx, tokens.data(), rows, D);/'
wait

bad=0
for i in $(seq $count); do
    dir="$work/$i"
    if [ -e "$dir/problem" ]; then
        verdict="$(cat "$dir/problem")"
        bad=$((bad + 1))
    else
        verdict="noticed by $(grep -c FAILED "$dir/tests.log" || true) tests, first difference $(cat "$dir/first")"
        if [ "$(cat "$dir/tests")" = pass ]; then
            verdict="$verdict: NOT NOTICED by the tests"
            bad=$((bad + 1))
        elif [ "$(cat "$dir/first")" != "$(cat "$dir/expected")" ]; then
            verdict="$verdict: EXPECTED $(cat "$dir/expected")"
            bad=$((bad + 1))
        fi
    fi
    echo "$(cat "$dir/title"): $verdict"
done
[ $bad -eq 0 ] || { echo "$bad mutations were not noticed, or at the wrong tensor"; exit 1; }
echo "all $count mutations were noticed, by the tests and by compare at the right tensor"
