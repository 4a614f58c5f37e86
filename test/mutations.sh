#!/bin/sh
# Plants one mistake at a time in a copy of ref_cpu.cpp and checks that the layer and model tests fail: a suite that cannot
# fail proves nothing. Usage: sh test/mutations.sh (make mutations). Needs the objects of `make test`.
set -eu
cd "$(dirname "$0")/.."
CXX=${CXX:-g++}
FLAGS="-std=c++17 -O1 -ffp-contract=off -w -I."
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

tests="build/test/main.o build/test/test_layers.o build/test/test_model.o build/tokenizer.o"
for o in $tests; do
    [ -e "$o" ] || { echo "$o is missing: run 'make test' first"; exit 1; }
done
link="$(grep -q -- -fopenmp build/flags && echo -fopenmp || true)"

# build NAME: compiles $work/ref_cpu.cpp and runs the tests against it; its exit status is that of the tests
build_and_run() {
    $CXX $FLAGS -c -o "$work/ref_cpu.o" "$work/ref_cpu.cpp"
    $CXX $link -o "$work/tests" $tests "$work/ref_cpu.o"
    "$work/tests" >"$work/log" 2>&1
}

cp ref_cpu.cpp "$work/ref_cpu.cpp"
build_and_run || { cat "$work/log"; echo "the unchanged code fails"; exit 1; }
echo "unchanged: passes"

survived=0
# mutate TITLE SED-EXPRESSION: the expression must change the file
mutate() {
    sed "$2" ref_cpu.cpp >"$work/ref_cpu.cpp"
    if cmp -s ref_cpu.cpp "$work/ref_cpu.cpp"; then
        echo "$1: the expression matches nothing any more"
        survived=$((survived + 1))
    elif build_and_run; then
        echo "$1: NOT NOTICED"
        survived=$((survived + 1))
    else
        echo "$1: noticed by $(grep -c FAILED "$work/log") tests"
    fi
}

mutate "sign of A"                     's/decay ? -std::exp(A_log\[h\])/decay ? std::exp(A_log[h])/'
mutate "exclusive cumulative sum"      's/cs\[size_t(t)\] = running += dA\[(row0 + t) \* n.H + h\];/{ cs[size_t(t)] = running; running += dA[(row0 + t) * n.H + h]; }/'
mutate "interleaved RoPE pairs"        's/T \*lo = x + r \* ld + h \* table.d, \*hi = lo + half;/T *lo = x + r * ld + h * table.d, *hi = lo + 1;/'
mutate "dt applied twice"              's/k.tmp\[size_t(s \* n.P + p)\] = k.to_end\[size_t(s)\] \* step/k.tmp[size_t(s * n.P + p)] = step[s * n.H] * k.to_end[size_t(s)] * step/'
mutate "order of grouped heads"        's/for (int64 h = hkv \* group; h < (hkv + 1) \* group; ++h)/for (int64 h = hkv; h < n.H; h += n.Hkv)/'
mutate "no 1\/sqrt(P)"                 's/const T scale = T(1.0 \/ std::sqrt(double(n.P)));/const T scale = T(1);/'
mutate "state read before its update"  's/dot_rows(y + p, C, S + p \* n.N, n.N, std::min(kDotRows, n.P - p), n.N);/for (int64 k = p; k < std::min(p + kDotRows, n.P); ++k) y[k] = dot(S + k * n.N, C, n.N) - step * X[k] * dot(Bt, C, n.N);/'
mutate "position off by one in decode" 's/const int64 pos0 = state ? state->position : 0;/const int64 pos0 = state \&\& state->position ? state->position - 1 : 0;/'
mutate "tied gradient missing"         's/embedding_backward(g(Param::word_embed), dx, tokens.data(), rows, D);/if (!c.tie) embedding_backward(g(Param::word_embed), dx, tokens.data(), rows, D);/'
mutate "residual weight on the branch" 's/out\[r \* D + d\] = w\[d\] \* x\[r \* D + d\] + m\[r \* D + d\];/out[r * D + d] = x[r * D + d] + w[d] * m[r * D + d];/'

[ $survived -eq 0 ] || { echo "$survived mutations were not noticed"; exit 1; }
echo "every mutation was noticed"
