// ref_cpu.cpp: the whole model on the CPU, forward and backward by hand, in the order in which data flows.
//
// READING GUIDE. Each op stands as a pair: X_forward, whose comment gives the equation, and X_backward, which undoes
// the numbered steps of the forward in reverse and quotes each. All are templates on the number type T: float trains,
// double is the truth for the gradient check and the oracle.
//
//   1  small helpers      fused multiply-add, exp, vector registers, dot product, sum, maximum
//   2  matmul             the one fast loop nest; every linear layer and every SSD chunk goes through it
//   3  embedding
//   4  RMSNorm
//   5  RoPE               one rotation for q, k, C and B
//   6  attention          causal, grouped-query
//   7  SSD                the state-space layer in three equal forms: recurrent, quadratic, chunked
//   8  residual           learned skip, dropout
//   9  SwiGLU
//  10  cross-entropy
//  11  AdamW
//  12  the model          one forward for training, prefill and decode; one backward
//  13  the engine         Model<float> behind the interface of transxssm.h
//  14  gradient check     every gradient above against central differences
//  15  benchmark
//  16  host side          what every engine shares: configuration, parameters, files, exchange, sampling, commands
//  17  the oracle         every number of a pass, for other implementations
//  18  compare            an oracle and a candidate
//  19  main
//
// SAME BITS FOR ANY NUMBER OF THREADS. Threads own parts of the output; no sum is ever split between threads, so the
// order of every addition depends on shapes only. The Makefile turns off automatic contraction of a*b+c (the compiler
// would be free to choose differently in each build); where a fused multiply-add pays, it is written out.
#include <dirent.h>

#include <chrono>

#if defined(__AVX__)
#include <immintrin.h>
#endif

#include "transxssm.h"

#ifdef _OPENMP
#include <omp.h>
#endif

namespace ref {

// ---------------------------------------------------------------------------------------------------------------------
// 1  Small helpers
// ---------------------------------------------------------------------------------------------------------------------

// a*b + c with one rounding where the machine does that in one instruction; else the plain expression, since the
// library's emulation would be a hundred times slower.
static inline float fmadd(float a, float b, float c) {
#if defined(FP_FAST_FMAF) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}
static inline double fmadd(double a, double b, double c) {
#if defined(FP_FAST_FMA) || defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

// exp for a float, written so that the compiler can do 8 or 16 at a time (it cannot do that with the library's). exp(x)
// = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2)/2: the Taylor series to r^7 leaves 5e-9 relative, below float's 6e-8.
// ln 2 is subtracted in two parts so that n * ln2_hi is exact. Below -87.3 the result is 0, above 88.4 infinity.
static inline float exp_(float x) {
    float c = x < 88.8f ? x : 88.8f;  // a NaN becomes 88.8 here and is put back at the end
    c = c > -87.3f ? c : -87.3f;
    const float n = (c * 1.44269504f + 12582912.0f) - 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const float r = (c - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const uint32_t bits = uint32_t(int32_t(n) + 127) << 23;  // 2^n
    float scale;
    memcpy(&scale, &bits, 4);
    p = x > -87.3f ? p * scale : 0.0f;
    return x == x ? p : x;
}
static inline double exp_(double x) { return std::exp(x); }

// x_i = exp(x_i - top). A function of its own: inlined next to a loop that reads x again, clang does not vectorise it.
template <class T>
__attribute__((noinline)) static void exp_minus(T* x, T top, int64 n) {
    for (int64 i = 0; i < n; ++i) x[i] = exp_(x[i] - top);
}

// One vector register. A compiler vectorises loops over a plain array, but may leave that array in memory; values of this
// type stay in registers, even in small arrays, if the loops over them are unrolled and nothing takes their address.
#if defined(__AVX512F__)
static constexpr int64 kVectorBytes = 64;
#elif defined(__AVX__)
static constexpr int64 kVectorBytes = 32;
#else
static constexpr int64 kVectorBytes = 16;
#endif

template <class T>
struct Vector {
    static constexpr int64 W = kVectorBytes / sizeof(T);
    typedef T Type __attribute__((vector_size(kVectorBytes)));

    static Type load(const T* p) {
        Type v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static void store(T* p, Type v) { memcpy(p, &v, sizeof v); }
};

// x * b + c, element by element. Instructions by name where there are wide ones: g++ tuned for some machines with 64-byte
// vectors makes one multiply-add per element of the loop below.
#if defined(__AVX512F__)
static inline __m512 fmadd(float x, __m512 b, __m512 c) { return _mm512_fmadd_ps(_mm512_set1_ps(x), b, c); }
static inline __m512d fmadd(double x, __m512d b, __m512d c) { return _mm512_fmadd_pd(_mm512_set1_pd(x), b, c); }
#elif defined(__AVX__) && defined(__FMA__)
static inline __m256 fmadd(float x, __m256 b, __m256 c) { return _mm256_fmadd_ps(_mm256_set1_ps(x), b, c); }
static inline __m256d fmadd(double x, __m256d b, __m256d c) { return _mm256_fmadd_pd(_mm256_set1_pd(x), b, c); }
#else
template <class T>
static inline typename Vector<T>::Type fmadd(T x, typename Vector<T>::Type b, typename Vector<T>::Type c) {
    for (int64 e = 0; e < Vector<T>::W; ++e) c[e] = fmadd(x, b[e], c[e]);
    return c;
}
#endif

// W partial sums side by side, added up pairwise at the end: a fixed order that keeps vector units busy. 64 bytes
// whatever the machine, so that the order does not depend on it: one vector register or several.
template <class T>
struct Lanes {
    static constexpr int64 W = 64 / sizeof(T), kParts = 64 / kVectorBytes;
    typename Vector<T>::Type part[kParts] = {};

    static Lanes load(const T* p) {
        Lanes x;
        for (int64 i = 0; i < kParts; ++i) x.part[i] = Vector<T>::load(p + i * Vector<T>::W);
        return x;
    }
    friend Lanes operator*(Lanes a, const Lanes& b) {
        for (int64 i = 0; i < kParts; ++i) a.part[i] *= b.part[i];
        return a;
    }
    void operator+=(const Lanes& b) {
        for (int64 i = 0; i < kParts; ++i) part[i] += b.part[i];
    }
    void raise(const Lanes& b) {  // each to the larger of the two
        for (int64 i = 0; i < kParts; ++i) part[i] = b.part[i] > part[i] ? b.part[i] : part[i];
    }
    void store(T* p) const {
        for (int64 i = 0; i < kParts; ++i) Vector<T>::store(p + i * Vector<T>::W, part[i]);
    }
    T total() const {
        T s[W];
        store(s);
        for (int64 half = W / 2; half > 0; half /= 2)
            for (int64 i = 0; i < half; ++i) s[i] += s[i + half];
        return s[0];
    }
};
template <class T>
static inline T dot(const T* a, const T* b, int64 n) {
    constexpr int64 W = Lanes<T>::W;
    Lanes<T> even, odd;
    int64 i = 0;
    for (; i + 2 * W <= n; i += 2 * W) {
        even += Lanes<T>::load(a + i) * Lanes<T>::load(b + i);
        odd += Lanes<T>::load(a + i + W) * Lanes<T>::load(b + i + W);
    }
    even += odd;
    T rest = 0;
    for (; i < n; ++i) rest += a[i] * b[i];
    return even.total() + rest;
}
template <class T>
static inline T sum(const T* a, int64 n) {
    constexpr int64 W = Lanes<T>::W;
    Lanes<T> lanes;
    int64 i = 0;
    for (; i + W <= n; i += W) lanes += Lanes<T>::load(a + i);
    T rest = 0;
    for (; i < n; ++i) rest += a[i];
    return lanes.total() + rest;
}
// The largest of n >= 1 values.
template <class T>
static inline T max_of(const T* a, int64 n) {
    constexpr int64 W = Lanes<T>::W;
    T top = a[0];
    int64 i = 1;
    if (n >= W) {
        Lanes<T> lanes = Lanes<T>::load(a);
        for (i = W; i + W <= n; i += W) lanes.raise(Lanes<T>::load(a + i));
        T s[W];
        lanes.store(s);
        for (const T x : s) top = x > top ? x : top;
    }
    for (; i < n; ++i) top = a[i] > top ? a[i] : top;
    return top;
}

[[maybe_unused]] static inline bool in_parallel() {
#ifdef _OPENMP
    return omp_in_parallel();
#else
    return false;
#endif
}
[[maybe_unused]] static int thread_limit() {
#ifdef _OPENMP
    return omp_get_max_threads();
#else
    return 1;
#endif
}
// Elements below which starting threads costs more than it saves.
[[maybe_unused]] static constexpr int64 kParallelMin = 1 << 14;

// ---------------------------------------------------------------------------------------------------------------------
// 2  matmul: C = A B
// ---------------------------------------------------------------------------------------------------------------------
// Idea: a tile of C of kRows x kCols stays in vector registers while k runs; each step loads one row of B (contiguous) and
// kRows single values of A. That is one load for every kRows * kCols / (kRows + kCols) multiply-adds, so that arithmetic,
// not memory, is the limit.
//
//            kCols                B is copied ("packed") beforehand into panels of kCols columns and kDepth rows, so that
//         +--------+              the inner loop reads it front to back and both storage orders of B cost the same.
//         |  B     | k            A transposed A is packed likewise, kRowBlock rows at a time.
//         +--------+              Edges: packing fills up with zeros, and only what is inside C is written.
//   +---+ +--------+
//   | A | | C tile | kRows        Order of summation: k ascending in blocks of kDepth, one accumulator per element of C.
//   +---+ +--------+              It depends on K alone, not on M, N or the thread (fewer than kRows rows: see below).

#if defined(__AVX512F__) || defined(__aarch64__)
static constexpr int64 kRows = 8;  // of 32 registers, 16 hold the tile of C
#else
static constexpr int64 kRows = 6;  // of 16 registers, 12 hold the tile of C, 2 a row of B, 1 a value of A
#endif
static constexpr int64 kColVectors = 2;                               // kCols, counted in vectors
static constexpr int64 kDepth = 256;                                  // one panel of B: 8 to 32 KB
static constexpr int64 kRowBlock = (64 + kRows - 1) / kRows * kRows;  // rows of C per task: 64, or as many whole tiles
static constexpr int64 kWidth = 256;                                  // columns of B packed at a time: 256 KB of float

// One tile: c (+)= sum_k a[i][k * a_step] * b[k][j] for i < rows, j < cols. b is a packed panel. acc lives in registers
// because every loop over it is unrolled.
template <class T>
static void matmul_tile(T* c, int64 ldc, int64 rows, int64 cols, const T* const* a, int64 a_step, const T* b,
                        int64 depth, bool accumulate) {
    typedef Vector<T> V;
    constexpr int64 kCols = kColVectors * V::W;
    typename V::Type acc[kRows][kColVectors], b_k[kColVectors];
#pragma GCC unroll 8
    for (int64 i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int64 j = 0; j < kColVectors; ++j) acc[i][j] = typename V::Type{};
    for (int64 k = 0; k < depth; ++k) {
#pragma GCC unroll 8
        for (int64 j = 0; j < kColVectors; ++j) b_k[j] = V::load(b + k * kCols + j * V::W);
#pragma GCC unroll 8
        for (int64 i = 0; i < kRows; ++i)
#pragma GCC unroll 8
            for (int64 j = 0; j < kColVectors; ++j) acc[i][j] = fmadd(a[i][k * a_step], b_k[j], acc[i][j]);
    }
    T edge[kRows][kCols];  // a tile that reaches past the edge of C goes through here
    const bool whole = rows == kRows && cols == kCols;
    T* out = whole ? c : edge[0];
    const int64 ld_out = whole ? ldc : kCols;
#pragma GCC unroll 8
    for (int64 i = 0; i < kRows; ++i)
#pragma GCC unroll 8
        for (int64 j = 0; j < kColVectors; ++j) {
            T* o = out + i * ld_out + j * V::W;
            V::store(o, whole && accumulate ? V::load(o) + acc[i][j] : acc[i][j]);
        }
    if (whole) return;
    for (int64 i = 0; i < rows; ++i)
        for (int64 j = 0; j < cols; ++j) c[i * ldc + j] = accumulate ? c[i * ldc + j] + edge[i][j] : edge[i][j];
}

// The share of thread `thread` of `threads`; all of them call it together.
template <class T>
static void matmul_share(T* c, int64 ldc, const T* a, int64 lda, Layout la, const T* b, int64 ldb, Layout lb, int64 M,
                         int64 N, int64 K, bool accumulate, T* panels, int thread, int threads) {
    constexpr int64 kCols = kColVectors * Vector<T>::W;
    const auto barrier = [threads] {
        if (threads > 1) {
#ifdef _OPENMP
#pragma omp barrier
#endif
        }
    };
    alignas(64) T a_block[kRowBlock * kDepth];
    for (int64 n0 = 0; n0 < N; n0 += kWidth)
        for (int64 k0 = 0; k0 < K; k0 += kDepth) {
            const int64 width = std::min(kWidth, N - n0), depth = std::min(kDepth, K - k0);
            const int64 panel_count = (width + kCols - 1) / kCols;
            for (int64 p = thread; p < panel_count; p += threads) {  // pack B
                T* out = panels + p * kDepth * kCols;
                const int64 j0 = n0 + p * kCols, cols = std::min(kCols, N - j0);
                if (lb == Layout::plain) {
                    for (int64 k = 0; k < depth; ++k) {
                        for (int64 j = 0; j < cols; ++j) out[k * kCols + j] = b[(k0 + k) * ldb + j0 + j];
                        for (int64 j = cols; j < kCols; ++j) out[k * kCols + j] = 0;
                    }
                } else {
                    for (int64 kb = 0; kb < depth; kb += 16) {  // 16 columns at a time: whole cache lines of B
                        const int64 ke = std::min(kb + 16, depth);
                        for (int64 j = 0; j < cols; ++j)
                            for (int64 k = kb; k < ke; ++k) out[k * kCols + j] = b[(j0 + j) * ldb + k0 + k];
                        for (int64 j = cols; j < kCols; ++j)
                            for (int64 k = kb; k < ke; ++k) out[k * kCols + j] = 0;
                    }
                }
            }
            barrier();  // panels are complete
            for (int64 block = thread; block * kRowBlock < M; block += threads) {
                const int64 i0 = block * kRowBlock, rows = std::min(kRowBlock, M - i0);
                const T* base = a + i0 * lda + k0;
                int64 row_step = lda, k_step = 1;
                if (la == Layout::transposed) {  // pack A: tile after tile, k-major within
                    base = a_block;
                    row_step = 1;
                    k_step = kRowBlock;
                    for (int64 k = 0; k < depth; ++k)
                        for (int64 i = 0; i < rows; ++i) a_block[k * kRowBlock + i] = a[(k0 + k) * lda + i0 + i];
                }
                for (int64 p = 0; p < panel_count; ++p)
                    for (int64 i = 0; i < rows; i += kRows) {
                        const T* row[kRows];  // rows past the end alias the first; their results are dropped
                        for (int64 r = 0; r < kRows; ++r) row[r] = base + (i + r < rows ? i + r : i) * row_step;
                        const int64 j0 = n0 + p * kCols;
                        matmul_tile(c + (i0 + i) * ldc + j0, ldc, std::min(kRows, rows - i), std::min(kCols, N - j0),
                                    row, k_step, panels + p * kDepth * kCols, depth, accumulate || k0 > 0);
                    }
            }
            barrier();  // before the panels are overwritten
        }
}

// y_r = x . w_r for kDotRows rows of w: several sums in flight, so that none waits for its own last addition.
static constexpr int64 kDotRows = 4;
template <class T, int64 kCount = kDotRows>
static void dot_rows(T* y, const T* x, const T* w, int64 ldw, int64 rows, int64 K) {
    constexpr int64 W = Lanes<T>::W;
    if (rows < kCount) {  // the last rows, one by one: the same sums
        for (int64 r = 0; r < rows; ++r) dot_rows<T, 1>(y + r, x, w + r * ldw, ldw, 1, K);
        return;
    }
    Lanes<T> acc[kCount];
    int64 k = 0;
    for (; k + W <= K; k += W) {
        const Lanes<T> xk = Lanes<T>::load(x + k);
        for (int64 r = 0; r < kCount; ++r) {
            // Rows are short: without a hint the hardware starts to read ahead anew with each group of rows. A quarter
            // more bytes per second, measured; past the end of w the hint does nothing.
            __builtin_prefetch(w + (r + 4 * kCount) * ldw + k);
            acc[r] += xk * Lanes<T>::load(w + r * ldw + k);
        }
    }
    for (int64 r = 0; r < kCount; ++r) {
        T rest = 0;
        for (int64 j = k; j < K; ++j) rest += x[j] * w[r * ldw + j];
        y[r] = acc[r].total() + rest;
    }
}

// A few rows (decoding), with sums of their own order: packing would cost more than the product, so every row of C is made directly from memory. The
// limit is reading B once. Below 512 KB of B one thread has read it before a second one would have started.
[[maybe_unused]] static constexpr int64 kFewRowsParallelMin = 1 << 17;
template <class T>
static void matmul_few_rows(T* c, int64 ldc, const T* a, int64 lda, const T* b, int64 ldb, Layout lb, int64 M, int64 N,
                            int64 K, bool accumulate) {
    if (lb == Layout::transposed) {
#pragma omp parallel for schedule(static) if (M * N * K >= kFewRowsParallelMin && !in_parallel())
        for (int64 n0 = 0; n0 < N; n0 += kDotRows)
            for (int64 m = 0; m < M; ++m) {
                T y[kDotRows];
                const int64 rows = std::min(kDotRows, N - n0);
                dot_rows(y, a + m * lda, b + n0 * ldb, ldb, rows, K);
                for (int64 r = 0; r < rows; ++r) c[m * ldc + n0 + r] = accumulate ? c[m * ldc + n0 + r] + y[r] : y[r];
            }
        return;
    }
    for (int64 m = 0; m < M; ++m) {
        if (!accumulate) std::fill(c + m * ldc, c + m * ldc + N, T(0));
        for (int64 k = 0; k < K; ++k)
            for (int64 n = 0; n < N; ++n) c[m * ldc + n] = fmadd(a[m * lda + k], b[k * ldb + n], c[m * ldc + n]);
    }
}

template <class T>
void matmul(T* c, int64 ldc, const T* a, int64 lda, Layout la, const T* b, int64 ldb, Layout lb, int64 M, int64 N,
            int64 K, bool accumulate) {
    if (M < kRows && la == Layout::plain) return matmul_few_rows(c, ldc, a, lda, b, ldb, lb, M, N, K, accumulate);
    // The packed panels of B, shared by the threads that work on this product; kept between calls.
    static thread_local std::vector<T> storage;
    constexpr int64 kCols = kColVectors * Vector<T>::W;
    const int64 needed = (std::min(N, kWidth) + kCols - 1) / kCols * kCols * kDepth;
    if (int64(storage.size()) < needed) storage.resize(size_t(needed));
    T* panels = storage.data();
#ifdef _OPENMP
    if (M * N * K > 4 * kParallelMin && M > kRowBlock && !in_parallel() && thread_limit() > 1) {
#pragma omp parallel
        matmul_share(c, ldc, a, lda, la, b, ldb, lb, M, N, K, accumulate, panels, omp_get_thread_num(),
                     omp_get_num_threads());
        return;
    }
#endif
    matmul_share(c, ldc, a, lda, la, b, ldb, lb, M, N, K, accumulate, panels, 0, 1);
}

// y = x W^T.  W (out,in), x (rows,in) -> y (rows,out)
template <class T>
void linear_forward(T* y, const T* x, const T* w, int64 rows, int64 in, int64 out) {
    matmul(y, out, x, in, Layout::plain, w, in, Layout::transposed, rows, out, in, false);
}

// dx = dy W      (rows,in)  = (rows,out) (out,in)
// dW += dy^T x   (out,in)   = (out,rows) (rows,in)
template <class T>
void linear_backward(T* dx, T* dw, const T* dy, const T* x, const T* w, int64 rows, int64 in, int64 out,
                     bool accumulate_dx) {
    matmul(dx, in, dy, out, Layout::plain, w, in, Layout::plain, rows, in, out, accumulate_dx);
    matmul(dw, in, dy, out, Layout::transposed, x, in, Layout::plain, out, in, rows, true);
}

// ---------------------------------------------------------------------------------------------------------------------
// 3  Embedding: x_r = E[token_r]
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void embedding_forward(T* x, const int32_t* tokens, const T* embed, int64 rows, int64 D) {
    for (int64 r = 0; r < rows; ++r) std::copy_n(embed + int64(tokens[r]) * D, D, x + r * D);
}

// dE[token_r] += dx_r, in token order. A token may occur many times, so threads own columns, not rows.
template <class T>
void embedding_backward(T* dembed, const T* dx, const int32_t* tokens, int64 rows, int64 D) {
    const int64 block = 64;
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 d0 = 0; d0 < D; d0 += block)
        for (int64 r = 0; r < rows; ++r)
            for (int64 d = d0; d < std::min(d0 + block, D); ++d) dembed[int64(tokens[r]) * D + d] += dx[r * D + d];
}

// ---------------------------------------------------------------------------------------------------------------------
// 4  RMSNorm: rstd = 1 / sqrt(mean(x^2) + eps);  u = x * rstd * w         x, u (rows,D)   w (D)   rstd (rows) is saved
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void rmsnorm_forward(T* u, T* rstd, const T* x, const T* w, double eps, int64 rows, int64 D) {
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        const T* xr = x + r * D;
        const T s = T(1) / std::sqrt(dot(xr, xr, D) / T(D) + T(eps));   // (1)
        for (int64 d = 0; d < D; ++d) u[r * D + d] = xr[d] * s * w[d];  // (2)
        rstd[r] = s;
    }
}

// (2) u = x * rstd * w:  dw += du * x * rstd;   through x directly: du * w * rstd;   drstd = sum_d du * w * x
// (1) rstd = (mean(x^2) + eps)^(-1/2):          drstd/dx = -rstd^3 x / D
// together: dx += rstd * (du * w - x * rstd^2 * sum(du * w * x) / D)
template <class T>
void rmsnorm_backward(T* dx, T* dw, const T* du, const T* x, const T* w, const T* rstd, int64 rows, int64 D) {
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        const T *xr = x + r * D, *dur = du + r * D;
        T* dxr = dx + r * D;
        Lanes<T> lanes;
        constexpr int64 W = Lanes<T>::W;
        int64 i = 0;
        for (; i + W <= D; i += W) lanes += Lanes<T>::load(dur + i) * Lanes<T>::load(w + i) * Lanes<T>::load(xr + i);
        T rest = 0;
        for (; i < D; ++i) rest += dur[i] * w[i] * xr[i];
        const T s = rstd[r], k = s * s * (lanes.total() + rest) / T(D);
        for (int64 d = 0; d < D; ++d) dxr[d] += s * (dur[d] * w[d] - xr[d] * k);
    }
    const int64 block = 64;
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 d0 = 0; d0 < D; d0 += block)  // threads own channels, so that each sum over rows has one order
        for (int64 r = 0; r < rows; ++r)
            for (int64 d = d0; d < std::min(d0 + block, D); ++d) dw[d] += du[r * D + d] * x[r * D + d] * rstd[r];
}

// ---------------------------------------------------------------------------------------------------------------------
// 5  RoPE: the pair (x_j, x_{j+d/2}) turns by the angle pos * theta^(-2j/d), j < d/2         docs/rope.md; arXiv 2104.09864
// ---------------------------------------------------------------------------------------------------------------------
// Half-split pairs, not neighbours (2j, 2j+1). The same function serves q, k (d = P) and C, B (d = N): the "Unified" in
// the paper's title. A rotation is orthogonal, so that the backward is the rotation by the negative angle.

template <class T>
void RopeTable<T>::extend(int64 dim, double theta, int64 count) {
    if (d == dim && positions >= count) return;
    const int64 from = d == dim ? positions : 0, half = dim / 2;
    d = dim;
    positions = std::max(count, 2 * from);  // doubling: decoding asks for one more each time
    cos.resize(size_t(positions * half));
    sin.resize(size_t(positions * half));
    for (int64 pos = from; pos < positions; ++pos)
        for (int64 j = 0; j < half; ++j) {
            const double angle = double(pos) * std::pow(theta, -2.0 * double(j) / double(dim));
            cos[size_t(pos * half + j)] = T(std::cos(angle));
            sin[size_t(pos * half + j)] = T(std::sin(angle));
        }
}

template <class T>
void rope(T* x, const RopeTable<T>& table, int64 B, int64 T_, int64 H, int64 ld, int64 pos0, bool inverse) {
    const int64 half = table.d / 2;
#pragma omp parallel for schedule(static) if (B * T_ * H * half > kParallelMin)
    for (int64 r = 0; r < B * T_; ++r) {
        const T* cos = table.cos.data() + (pos0 + r % T_) * half;
        const T* sin = table.sin.data() + (pos0 + r % T_) * half;
        const T sign = inverse ? T(-1) : T(1);
        for (int64 h = 0; h < H; ++h) {
            T *lo = x + r * ld + h * table.d, *hi = lo + half;
            for (int64 j = 0; j < half; ++j) {
                const T a = lo[j], b = hi[j], c = cos[j], s = sign * sin[j];
                lo[j] = a * c - b * s;
                hi[j] = b * c + a * s;
            }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 6  Attention: y_t = sum_{s<=t} p_ts v_s,  p_t = softmax_s(q_t . k_s / sqrt(P))
// ---------------------------------------------------------------------------------------------------------------------
// Grouped-query: query heads h with the same h / (H/Hkv) share one key/value head. Rows are done in blocks of kQueryBlock;
// only one block of probabilities exists at a time. Saved: lse_t = log sum_s exp(q_t . k_s / sqrt(P)), from which the
// backward makes p again. A task is one (sequence, key/value head): it owns its part of y, dq, dk and dv.

static constexpr int64 kQueryBlock = 64;

// p (rows,keys) of query block t0: scores, scaled. Row i may see keys 0 .. keys-rows+i.
template <class T>
static void attention_scores(T* p, const T* q, const T* k, int64 rows, int64 keys, const AttentionShape& n) {
    matmul(p, keys, q, n.ld_q, Layout::plain, k, n.ld_kv, Layout::transposed, rows, keys, n.P, false);
    const T scale = T(1.0 / std::sqrt(double(n.P)));
    for (int64 i = 0; i < rows * keys; ++i) p[i] *= scale;
}

template <class T>
void attention_forward(T* y, T* lse, const T* q, const T* k, const T* v, const AttentionShape& n) {
    const int64 group = n.H / n.Hkv;
#pragma omp parallel if (n.B * n.T * n.S * n.P > kParallelMin)
    {
        std::vector<T> p(size_t(std::min(kQueryBlock, n.T) * n.S));
#pragma omp for schedule(static)
        for (int64 task = 0; task < n.B * n.Hkv; ++task) {
            const int64 b = task / n.Hkv, hkv = task % n.Hkv;
            const T *kb = k + b * n.seq_kv + hkv * n.P, *vb = v + b * n.seq_kv + hkv * n.P;
            for (int64 h = hkv * group; h < (hkv + 1) * group; ++h)
                for (int64 t0 = 0; t0 < n.T; t0 += kQueryBlock) {
                    const int64 rows = std::min(kQueryBlock, n.T - t0), keys = n.S - n.T + t0 + rows;
                    const int64 row0 = b * n.T + t0;
                    attention_scores(p.data(), q + row0 * n.ld_q + h * n.P, kb, rows, keys, n);  // (1)
                    for (int64 i = 0; i < rows; ++i) {                                           // (2) softmax
                        T* pi = p.data() + i * keys;
                        const int64 visible = keys - rows + i + 1;
                        const T top = max_of(pi, visible);
                        exp_minus(pi, top, visible);
                        const T z = sum(pi, visible);
                        for (int64 s = 0; s < visible; ++s) pi[s] *= T(1) / z;
                        std::fill(pi + visible, pi + keys, T(0));
                        lse[(row0 + i) * n.H + h] = top + std::log(z);
                    }
                    matmul(y + row0 * n.H * n.P + h * n.P, n.H * n.P, p.data(), keys, Layout::plain, vb, n.ld_kv,
                           Layout::plain, rows, n.P, keys, false);  // (3) y = p v
                }
        }
    }
}

// (3) y = p v:             dp = dy v^T,  dv += p^T dy
// (2) p = softmax(z):      dz = p * (dp - sum_s p dp),  and sum_s p_ts dp_ts = dy_t . y_t
// (1) z = q k^T / sqrt(P): dq = dz k / sqrt(P),  dk += dz^T q / sqrt(P)
template <class T>
void attention_backward(T* dq, T* dk, T* dv, const T* dy, const T* q, const T* k, const T* v, const T* y, const T* lse,
                        const AttentionShape& n) {
    const int64 group = n.H / n.Hkv;
    const T scale = T(1.0 / std::sqrt(double(n.P)));
#pragma omp parallel if (n.B * n.T * n.S * n.P > kParallelMin)
    {
        std::vector<T> p(size_t(std::min(kQueryBlock, n.T) * n.S)), dz(p.size());
#pragma omp for schedule(static)
        for (int64 task = 0; task < n.B * n.Hkv; ++task) {
            const int64 b = task / n.Hkv, hkv = task % n.Hkv, kv0 = b * n.seq_kv + hkv * n.P;
            for (int64 s = 0; s < n.S; ++s) {
                std::fill_n(dk + kv0 + s * n.ld_kv, n.P, T(0));
                std::fill_n(dv + kv0 + s * n.ld_kv, n.P, T(0));
            }
            for (int64 h = hkv * group; h < (hkv + 1) * group; ++h)
                for (int64 t0 = 0; t0 < n.T; t0 += kQueryBlock) {
                    const int64 rows = std::min(kQueryBlock, n.T - t0), keys = n.S - n.T + t0 + rows;
                    const int64 row0 = b * n.T + t0, q0 = row0 * n.ld_q + h * n.P, y0 = row0 * n.H * n.P + h * n.P;
                    attention_scores(p.data(), q + q0, k + kv0, rows, keys, n);
                    matmul(dz.data(), keys, dy + y0, n.H * n.P, Layout::plain, v + kv0, n.ld_kv, Layout::transposed,
                           rows, keys, n.P, false);  // (3) dp, still without the softmax's part
                    for (int64 i = 0; i < rows; ++i) {
                        T *pi = p.data() + i * keys, *dzi = dz.data() + i * keys;
                        const int64 visible = keys - rows + i + 1;
                        const T l = lse[(row0 + i) * n.H + h];
                        const T dyy = dot(dy + y0 + i * n.H * n.P, y + y0 + i * n.H * n.P, n.P);
                        for (int64 s = 0; s < visible; ++s) {
                            pi[s] = exp_(pi[s] - l);
                            dzi[s] = pi[s] * (dzi[s] - dyy) * scale;  // (2), and the scale of (1)
                        }
                        std::fill(pi + visible, pi + keys, T(0));
                        std::fill(dzi + visible, dzi + keys, T(0));
                    }
                    matmul(dv + kv0, n.ld_kv, p.data(), keys, Layout::transposed, dy + y0, n.H * n.P, Layout::plain,
                           keys, n.P, rows, true);  // (3)
                    matmul(dq + q0, n.ld_q, dz.data(), keys, Layout::plain, k + kv0, n.ld_kv, Layout::plain, rows, n.P,
                           keys, false);  // (1)
                    matmul(dk + kv0, n.ld_kv, dz.data(), keys, Layout::transposed, q + q0, n.ld_q, Layout::plain, keys,
                           n.P, rows, true);  // (1)
                }
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 7  SSD: S_t = a_t S_{t-1} + dt_t X_t (x) B_t,  Y_t = S_t C_t,  a_t = exp(dA_t)              docs/ssd.md; arXiv 2405.21060
// ---------------------------------------------------------------------------------------------------------------------

// dt = softplus(z), z = dt_raw + dt_bias;  dA = -exp(A_log) dt. softplus(z) = log1p(exp(z)), and z itself above 20, where
// the two differ by less than exp(-20). dt_raw (rows, `ld` apart) -> dt, dA (rows,H)
template <class T>
void ssd_dt_forward(T* dt, T* dA, const T* dt_raw, const T* dt_bias, const T* A_log, bool decay, int64 rows, int64 H,
                    int64 ld) {
    for (int64 h = 0; h < H; ++h) {
        const T A = decay ? -std::exp(A_log[h]) : T(0);
        for (int64 r = 0; r < rows; ++r) {
            const T z = dt_raw[r * ld + h] + dt_bias[h];
            dt[r * H + h] = z > T(20) ? z : std::log1p(std::exp(z));
            dA[r * H + h] = A * dt[r * H + h];
        }
    }
}

// dA = A dt:            d(dt) gets A d(dA);  dA_log += sum d(dA) dA, since d(dA)/d(A_log) = A dt = dA
// dt = softplus(z):     dz = sigmoid(z) d(dt)
// z = dt_raw + dt_bias: d(dt_raw) = dz,  d(dt_bias) += sum dz
template <class T>
void ssd_dt_backward(T* ddt_raw, T* ddt_bias, T* dA_log, const T* ddt, const T* ddA, const T* dt_raw, const T* dt_bias,
                     const T* A_log, const T* dA, bool decay, int64 rows, int64 H, int64 ld) {
    for (int64 h = 0; h < H; ++h) {
        const T A = decay ? -std::exp(A_log[h]) : T(0);
        T bias = 0, log = 0;
        for (int64 r = 0; r < rows; ++r) {
            const int64 i = r * H + h;
            const T z = dt_raw[r * ld + h] + dt_bias[h];
            const T dz = (ddt[i] + A * ddA[i]) / (T(1) + std::exp(-z));
            ddt_raw[r * ld + h] = dz;
            bias += dz;
            log += ddA[i] * dA[i];
        }
        ddt_bias[h] += bias;
        if (decay) dA_log[h] += log;
    }
}

// ---- 7a  Recurrent: the definition, one token after the other. Also the decode step. -------------------------------

template <class T>
void ssd_recurrent_forward(T* Y, T* S_T, const T* sc, const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0,
                           const SsdShape& n) {
    const int64 PN = n.P * n.N;
#pragma omp parallel for schedule(static) if (n.B * n.T * n.H * PN > 4 * kParallelMin)
    for (int64 bh = 0; bh < n.B * n.H; ++bh) {
        const int64 b = bh / n.H, h = bh % n.H;
        std::vector<T> local(S_T ? 0 : size_t(PN));
        T* S = S_T ? S_T + bh * PN : local.data();
        if (!S_0) std::fill_n(S, PN, T(0));
        else if (S_0 != S_T) std::copy_n(S_0 + bh * PN, PN, S);  // equal: the state is advanced in place
        for (int64 t = 0; t < n.T; ++t) {
            const int64 r = b * n.T + t;
            const T *C = sc + r * n.ld + h * n.N, *Bt = sb + r * n.ld + h * n.N, *X = sx + r * n.ld + h * n.P;
            const T a = exp_(dA[r * n.H + h]), step = dt[r * n.H + h];
            for (int64 p = 0; p < n.P; ++p) {
                const T x = step * X[p];
                for (int64 i = 0; i < n.N; ++i) S[p * n.N + i] = a * S[p * n.N + i] + x * Bt[i];  // (1)
            }
            T* y = Y + (r * n.H + h) * n.P;
            for (int64 p = 0; p < n.P; p += kDotRows)  // (2)
                dot_rows(y + p, C, S + p * n.N, n.N, std::min(kDotRows, n.P - p), n.N);
        }
    }
}

// From the last token to the first, with dS the gradient of the state after token t:
// (2) Y_t = S_t C_t:                       dS += dY_t (x) C_t,  dC_t = S_t^T dY_t
// (1) S_t = a_t S_{t-1} + dt_t X_t (x) B_t: dX_t = dt_t dS B_t,  dB_t = dt_t dS^T X_t,  ddt_t = X_t . dS B_t,
//                                          d(dA)_t = a_t <S_{t-1}, dS>,  dS_{t-1} = a_t dS
template <class T>
void ssd_recurrent_backward(T* dsc, T* dsb, T* dsx, T* ddt, T* ddA, T* dS_0, const T* dY, const T* dS_T, const T* sc,
                            const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0, const SsdShape& n) {
    const int64 PN = n.P * n.N;
#pragma omp parallel for schedule(static) if (n.B * n.T * n.H * PN > kParallelMin)
    for (int64 bh = 0; bh < n.B * n.H; ++bh) {
        const int64 b = bh / n.H, h = bh % n.H;
        std::vector<T> S(size_t((n.T + 1) * PN), T(0)),
            dS(size_t(PN), T(0));  // every state: before and after each token
        if (S_0) std::copy_n(S_0 + bh * PN, PN, S.data());
        for (int64 t = 0; t < n.T; ++t) {
            const int64 r = b * n.T + t;
            for (int64 p = 0; p < n.P; ++p)
                for (int64 i = 0; i < n.N; ++i)
                    S[size_t((t + 1) * PN + p * n.N + i)] =
                        exp_(dA[r * n.H + h]) * S[size_t(t * PN + p * n.N + i)] +
                        dt[r * n.H + h] * sx[r * n.ld + h * n.P + p] * sb[r * n.ld + h * n.N + i];
        }
        if (dS_T) std::copy_n(dS_T + bh * PN, PN, dS.data());
        for (int64 t = n.T - 1; t >= 0; --t) {
            const int64 r = b * n.T + t, c0 = r * n.ld + h * n.N, x0 = r * n.ld + h * n.P;
            const T a = exp_(dA[r * n.H + h]), step = dt[r * n.H + h];
            const T* before = S.data() + t * PN;
            const T* after = before + PN;
            T step_gradient = 0, decay_gradient = 0;
            std::fill_n(dsc + c0, n.N, T(0));
            std::fill_n(dsb + c0, n.N, T(0));
            for (int64 p = 0; p < n.P; ++p) {
                const T dy = dY[(r * n.H + h) * n.P + p], x = sx[x0 + p];
                T* dSp = dS.data() + p * n.N;
                T dSB = 0;
                for (int64 i = 0; i < n.N; ++i) {
                    dSp[i] += dy * sc[c0 + i];               // (2)
                    dsc[c0 + i] += dy * after[p * n.N + i];  // (2)
                    dSB += dSp[i] * sb[c0 + i];
                    dsb[c0 + i] += step * x * dSp[i];  // (1)
                    decay_gradient += before[p * n.N + i] * dSp[i];
                    dSp[i] *= a;  // (1) on to token t-1
                }
                dsx[x0 + p] = step * dSB;
                step_gradient += x * dSB;
            }
            ddt[r * n.H + h] = step_gradient;
            ddA[r * n.H + h] = a * decay_gradient;
        }
        if (dS_0) std::copy_n(dS.data(), PN, dS_0 + bh * PN);
    }
}

// ---- 7b  Quadratic, the "dual": the recurrence unrolled, which looks like attention without softmax -----------------
//
//     Y_t = sum_{s<=t} decay(t,s) (C_t . B_s) dt_s X_s + decay(t,-1) S_0 C_t,   decay(t,s) = exp(dA_{s+1} + ... + dA_t)
//     S_T = sum_s decay(T-1,s) dt_s X_s (x) B_s + decay(T-1,-1) S_0
//
// O(T^2), in plain loops: it exists to be read and to be compared with.

template <class T>
void ssd_quadratic_forward(T* Y, T* S_T, const T* sc, const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0,
                           const SsdShape& n) {
    const int64 PN = n.P * n.N;
#pragma omp parallel for schedule(static) if (n.B * n.T * n.H * n.T * n.P > kParallelMin)
    for (int64 bh = 0; bh < n.B * n.H; ++bh) {
        const int64 b = bh / n.H, h = bh % n.H;
        const auto row = [&](int64 t) { return b * n.T + t; };
        for (int64 t = 0; t < n.T; ++t) {
            const T* C = sc + row(t) * n.ld + h * n.N;
            T* y = Y + (row(t) * n.H + h) * n.P;
            std::fill_n(y, n.P, T(0));
            T log_decay = 0;  // grows as s walks back from t
            for (int64 s = t; s >= 0; --s) {
                const T* X = sx + row(s) * n.ld + h * n.P;
                const T weight = exp_(log_decay) * dot(C, sb + row(s) * n.ld + h * n.N, n.N) * dt[row(s) * n.H + h];
                for (int64 p = 0; p < n.P; ++p) y[p] += weight * X[p];
                log_decay += dA[row(s) * n.H + h];
            }
            if (S_0)
                for (int64 p = 0; p < n.P; ++p) y[p] += exp_(log_decay) * dot(S_0 + bh * PN + p * n.N, C, n.N);
        }
        if (!S_T) continue;
        T* S = S_T + bh * PN;
        T total = 0;
        for (int64 t = 0; t < n.T; ++t) total += dA[row(t) * n.H + h];
        for (int64 i = 0; i < PN; ++i) S[i] = S_0 ? exp_(total) * S_0[bh * PN + i] : T(0);
        T log_decay = 0;
        for (int64 s = n.T - 1; s >= 0; --s) {
            const T *X = sx + row(s) * n.ld + h * n.P, *Bs = sb + row(s) * n.ld + h * n.N;
            const T weight = exp_(log_decay) * dt[row(s) * n.H + h];
            for (int64 p = 0; p < n.P; ++p)
                for (int64 i = 0; i < n.N; ++i) S[p * n.N + i] += weight * X[p] * Bs[i];
            log_decay += dA[row(s) * n.H + h];
        }
    }
}

// Each term is a product; each factor's gradient is the rest of the product. A term that decay(t,s) multiplies adds its
// value times its gradient, z, to d(dA)_u for every u with s < u <= t: noted as +z at u = s+1 and -z at u = t+1, summed
// up at the end.
template <class T>
void ssd_quadratic_backward(T* dsc, T* dsb, T* dsx, T* ddt, T* ddA, T* dS_0, const T* dY, const T* dS_T, const T* sc,
                            const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0, const SsdShape& n) {
    const int64 PN = n.P * n.N;
#pragma omp parallel for schedule(static) if (n.B * n.T * n.H * n.T * n.P > kParallelMin)
    for (int64 bh = 0; bh < n.B * n.H; ++bh) {
        const int64 b = bh / n.H, h = bh % n.H;
        const auto row = [&](int64 t) { return b * n.T + t; };
        const T* S0 = S_0 ? S_0 + bh * PN : nullptr;
        const T* dST = dS_T ? dS_T + bh * PN : nullptr;
        T* dS0 = dS_0 ? dS_0 + bh * PN : nullptr;
        std::vector<T> z(size_t(n.T + 1), T(0));
        const auto note = [&](int64 s, int64 t, T value) {
            z[size_t(s + 1)] += value;
            z[size_t(t + 1)] -= value;
        };
        for (int64 t = 0; t < n.T; ++t) {
            std::fill_n(dsc + row(t) * n.ld + h * n.N, n.N, T(0));
            std::fill_n(dsb + row(t) * n.ld + h * n.N, n.N, T(0));
            std::fill_n(dsx + row(t) * n.ld + h * n.P, n.P, T(0));
            ddt[row(t) * n.H + h] = 0;
        }
        if (dS0) std::fill_n(dS0, PN, T(0));
        for (int64 t = 0; t < n.T; ++t) {
            const T *C = sc + row(t) * n.ld + h * n.N, *dy = dY + (row(t) * n.H + h) * n.P;
            T* dC = dsc + row(t) * n.ld + h * n.N;
            T log_decay = 0;
            for (int64 s = t; s >= 0; --s) {  // Y_t gets decay (C_t . B_s) dt_s X_s
                const int64 c0 = row(s) * n.ld + h * n.N, x0 = row(s) * n.ld + h * n.P;
                const T decay = exp_(log_decay), step = dt[row(s) * n.H + h];
                const T CB = dot(C, sb + c0, n.N), dyX = dot(dy, sx + x0, n.P);
                for (int64 i = 0; i < n.N; ++i) {
                    dC[i] += decay * step * dyX * sb[c0 + i];
                    dsb[c0 + i] += decay * step * dyX * C[i];
                }
                for (int64 p = 0; p < n.P; ++p) dsx[x0 + p] += decay * step * CB * dy[p];
                ddt[row(s) * n.H + h] += decay * CB * dyX;
                note(s, t, decay * step * CB * dyX);
                log_decay += dA[row(s) * n.H + h];
            }
            const T decay = exp_(log_decay);  // Y_t gets decay S_0 C_t
            for (int64 p = 0; p < n.P; ++p)
                for (int64 i = 0; i < n.N; ++i) {
                    if (dS0) dS0[p * n.N + i] += decay * dy[p] * C[i];
                    if (!S0) continue;
                    dC[i] += decay * dy[p] * S0[p * n.N + i];
                    note(-1, t, decay * dy[p] * S0[p * n.N + i] * C[i]);
                }
        }
        if (dST) {
            T log_decay = 0;
            for (int64 s = n.T - 1; s >= 0; --s) {  // S_T gets decay dt_s X_s (x) B_s
                const int64 c0 = row(s) * n.ld + h * n.N, x0 = row(s) * n.ld + h * n.P;
                const T decay = exp_(log_decay), step = dt[row(s) * n.H + h];
                for (int64 p = 0; p < n.P; ++p)
                    for (int64 i = 0; i < n.N; ++i) {
                        const T d = dST[p * n.N + i] * decay, x = sx[x0 + p], bb = sb[c0 + i];
                        dsx[x0 + p] += d * step * bb;
                        dsb[c0 + i] += d * step * x;
                        ddt[row(s) * n.H + h] += d * x * bb;
                        note(s, n.T - 1, d * step * x * bb);
                    }
                log_decay += dA[row(s) * n.H + h];
            }
            const T decay = exp_(log_decay);  // S_T gets decay S_0
            for (int64 i = 0; i < PN; ++i) {
                if (dS0) dS0[i] += decay * dST[i];
                if (S0) note(-1, n.T - 1, decay * dST[i] * S0[i]);
            }
        }
        T running = 0;
        for (int64 u = 0; u < n.T; ++u) {
            running += z[size_t(u)];
            ddA[row(u) * n.H + h] = running;
        }
    }
}

// ---- 7c  Chunked: quadratic inside chunks of Q tokens, recurrent from chunk to chunk ---------------------------------
//
//   tokens   0 ....... Q-1 | Q ....... 2Q-1 | 2Q ...           cs: inclusive cumulative sum of dA inside the chunk
//            [ Q x Q       ]----S---->[ Q x Q ]----S---->      decay(t,s) = exp(cs_t - cs_s), always <= 1
//
//   chunk_cumsum   cs_t = dA_first + ... + dA_t
//   chunk_scan     Y_t = exp(cs_t) S_in C_t + sum_{s<=t} exp(cs_t - cs_s) (C_t . B_s) dt_s X_s
//   chunk_state    new = sum_s exp(cs_last - cs_s) dt_s X_s (x) B_s
//   state_passing  S_out = exp(cs_last) S_in + new
//
// All sums over tokens are matrix products of Q rows. One task sweeps the chunks of one (sequence, head). Saved for the
// backward: S_in of every chunk.

// decay (q,q): exp(cs_t - cs_s) for s <= t, else 0. Subtract, then mask, then exp: exp of a masked, positive difference
// could be infinite.
template <class T>
static void chunk_decay(T* decay, const T* cs, int64 q) {
    for (int64 t = 0; t < q; ++t) {
        for (int64 s = 0; s <= t; ++s) decay[t * q + s] = exp_(cs[t] - cs[s]);
        std::fill(decay + t * q + t + 1, decay + (t + 1) * q, T(0));
    }
}

// cs_t = dA_first + ... + dA_t, of a chunk of q tokens, which lie `stride` apart.
template <class T>
static void chunk_cumsum(T* cs, int64 cs_stride, const T* dA, int64 dA_stride, int64 q) {
    T running = 0;
    for (int64 t = 0; t < q; ++t) cs[t * cs_stride] = running += dA[t * dA_stride];
}

// The same for all chunks: cs, dA (B,length,H).
template <class T>
static void chunk_cumsums(std::vector<T>& cs, const std::vector<T>& dA, int64 B, int64 length, int64 H, int64 Q) {
    for (int64 b = 0; b < B; ++b)
        for (int64 t = 0; t < length; t += Q)
            for (int64 h = 0; h < H; ++h) {
                const int64 first = (b * length + t) * H + h;
                chunk_cumsum(cs.data() + first, H, dA.data() + first, H, std::min(Q, length - t));
            }
}

// The pieces of one chunk that forward and backward both need.
template <class T>
struct SsdChunk {
    int64 q, row0;             // tokens, first row
    std::vector<T> cs;         // (q)
    std::vector<T> to_end;     // (q) exp(cs_last - cs_t)
    std::vector<T> from_in;    // (q) exp(cs_t)
    std::vector<T> decay;      // (q,q)
    std::vector<T> CB;         // (q,q) C_t . B_s
    std::vector<T> tmp, tmp2;  // (q, max(P,N,q))

    explicit SsdChunk(const SsdShape& n) : q(0), row0(0) {
        const int64 m = std::min(n.Q, n.T);
        for (auto* v : {&cs, &to_end, &from_in}) v->resize(size_t(m));
        for (auto* v : {&decay, &CB}) v->resize(size_t(m * m));
        for (auto* v : {&tmp, &tmp2}) v->resize(size_t(m * std::max({n.P, n.N, m})));
    }
    void load(const T* sc, const T* sb, const T* dA, int64 b, int64 h, int64 chunk, const SsdShape& n) {
        const int64 t0 = chunk * n.Q;
        q = std::min(n.Q, n.T - t0);
        row0 = b * n.T + t0;
        chunk_cumsum(cs.data(), 1, dA + row0 * n.H + h, n.H, q);
        for (int64 t = 0; t < q; ++t) {
            to_end[size_t(t)] = exp_(cs[size_t(q - 1)] - cs[size_t(t)]);
            from_in[size_t(t)] = exp_(cs[size_t(t)]);
        }
        chunk_decay(decay.data(), cs.data(), q);
        const int64 c0 = row0 * n.ld + h * n.N;
        matmul(CB.data(), q, sc + c0, n.ld, Layout::plain, sb + c0, n.ld, Layout::transposed, q, q, n.N, false);
    }
    T from_in_to_end() const { return from_in[size_t(q - 1)]; }
};

template <class T>
void ssd_chunked_forward(T* Y, T* S_T, T* chunk_states, const T* sc, const T* sb, const T* sx, const T* dt, const T* dA,
                         const T* S_0, const SsdShape& n) {
    const int64 PN = n.P * n.N, NC = (n.T + n.Q - 1) / n.Q, HP = n.H * n.P;
#pragma omp parallel if (n.B * n.T * n.H * PN > kParallelMin)
    {
        SsdChunk<T> k(n);
        std::vector<T> S(size_t(PN), T(0));
#pragma omp for schedule(static)
        for (int64 bh = 0; bh < n.B * n.H; ++bh) {
            const int64 b = bh / n.H, h = bh % n.H;
            if (S_0) std::copy_n(S_0 + bh * PN, PN, S.data());
            else std::fill(S.begin(), S.end(), T(0));
            for (int64 chunk = 0; chunk < NC; ++chunk) {
                if (chunk_states) std::copy_n(S.data(), PN, chunk_states + (bh * NC + chunk) * PN);
                k.load(sc, sb, dA, b, h, chunk, n);
                const T *C = sc + k.row0 * n.ld + h * n.N, *Bc = sb + k.row0 * n.ld + h * n.N;
                const T *X = sx + k.row0 * n.ld + h * n.P, *step = dt + k.row0 * n.H + h;
                T* y = Y + k.row0 * HP + h * n.P;
                // chunk_scan, what comes from before the chunk: exp(cs_t) S_in C_t              (q,P) = (q,N) (N,P)
                matmul(y, HP, C, n.ld, Layout::plain, S.data(), n.N, Layout::transposed, k.q, n.P, n.N, false);
                for (int64 t = 0; t < k.q; ++t)
                    for (int64 p = 0; p < n.P; ++p) y[t * HP + p] *= k.from_in[size_t(t)];
                // chunk_scan, inside the chunk: (decay o C B^T dt) X                            (q,P) += (q,q) (q,P)
                for (int64 s = 0; s < k.q; ++s) k.tmp2[size_t(s)] = step[s * n.H];
                for (int64 t = 0; t < k.q; ++t)
                    for (int64 s = 0; s < k.q; ++s)
                        k.tmp[size_t(t * k.q + s)] =
                            k.decay[size_t(t * k.q + s)] * k.CB[size_t(t * k.q + s)] * k.tmp2[size_t(s)];
                matmul(y, HP, k.tmp.data(), k.q, Layout::plain, X, n.ld, Layout::plain, k.q, n.P, k.q, true);
                // chunk_state and state_passing                                                 (P,N) += (P,q) (q,N)
                for (int64 s = 0; s < k.q; ++s)
                    for (int64 p = 0; p < n.P; ++p)
                        k.tmp[size_t(s * n.P + p)] = k.to_end[size_t(s)] * step[s * n.H] * X[s * n.ld + p];
                for (int64 i = 0; i < PN; ++i) S[size_t(i)] *= k.from_in_to_end();
                matmul(S.data(), n.N, k.tmp.data(), n.P, Layout::transposed, Bc, n.ld, Layout::plain, n.P, n.N, k.q,
                       true);
            }
            if (S_T) std::copy_n(S.data(), PN, S_T + bh * PN);
        }
    }
}

// The chunks in reverse; dS is the gradient of S_out, then of S_in. Written G = C B^T, M = decay:
//   state_passing, chunk_state:  dB_s  = to_end_s dt_s dS^T X_s,   dXd_s = to_end_s dS B_s            (Xd = dt X)
//   chunk_scan inside, E_ts = dY_t . X_s:
//                                dB_s += sum_t (M E dt)_ts C_t,  dXd_s += sum_t (M G)_ts dY_t,  dC_t = sum_s (M E dt)_ts B_s
//   chunk_scan from before:      dC_t += exp(cs_t) S_in^T dY_t
//   dX = dt dXd,  ddt = X . dXd
//   state_passing:               dS_in = exp(cs_last) dS + sum_t exp(cs_t) dY_t (x) C_t
// The log-decays need no further product. cs_t multiplies exactly what C_t multiplies, and -cs_s what B_s does, so that
//   dcs_t = C_t . dC_t - B_t . dB_t,  and cs_last scales all of S_out: + <S_out, dS>
//   d(dA)_u = sum_{t>=u in the chunk} dcs_t + <S_out, dS>
// where <S_out, dS> = exp(cs_last) <S_in, dS> + sum_s B_s . (the state's part of dB_s). Derivation: docs/ssd.md.
template <class T>
void ssd_chunked_backward(T* dsc, T* dsb, T* dsx, T* ddt, T* ddA, T* dS_0, T* dchunk_states, const T* dY, const T* dS_T,
                          const T* sc, const T* sb, const T* sx, const T* dt, const T* dA, const T* chunk_states,
                          const SsdShape& n) {
    const int64 PN = n.P * n.N, NC = (n.T + n.Q - 1) / n.Q, HP = n.H * n.P;
#pragma omp parallel if (n.B * n.T * n.H * PN > kParallelMin)
    {
        SsdChunk<T> k(n);
        std::vector<T> dS(size_t(PN), T(0)), MEdt(k.CB.size());
#pragma omp for schedule(static)
        for (int64 bh = 0; bh < n.B * n.H; ++bh) {
            const int64 b = bh / n.H, h = bh % n.H;
            if (dS_T) std::copy_n(dS_T + bh * PN, PN, dS.data());
            else std::fill(dS.begin(), dS.end(), T(0));
            for (int64 chunk = NC - 1; chunk >= 0; --chunk) {
                k.load(sc, sb, dA, b, h, chunk, n);
                const int64 q = k.q, c0 = k.row0 * n.ld + h * n.N, x0 = k.row0 * n.ld + h * n.P;
                const T *C = sc + c0, *Bc = sb + c0, *X = sx + x0, *step = dt + k.row0 * n.H + h;
                const T *S_in = chunk_states + (bh * NC + chunk) * PN, *dy = dY + k.row0 * HP + h * n.P;
                T *dC = dsc + c0, *dB = dsb + c0, *dX = dsx + x0;
                // dB from the state: to_end dt X dS                                             (q,N) = (q,P) (P,N)
                matmul(dB, n.ld, X, n.ld, Layout::plain, dS.data(), n.N, Layout::plain, q, n.N, n.P, false);
                T S_dot_dS = k.from_in_to_end() * dot(S_in, dS.data(), PN);
                for (int64 s = 0; s < q; ++s) {
                    const T f = k.to_end[size_t(s)] * step[s * n.H];
                    for (int64 i = 0; i < n.N; ++i) dB[s * n.ld + i] *= f;
                    S_dot_dS += dot(Bc + s * n.ld, dB + s * n.ld, n.N);
                }
                // dXd from the state: to_end B dS^T                                             (q,P) = (q,N) (N,P)
                matmul(dX, n.ld, Bc, n.ld, Layout::plain, dS.data(), n.N, Layout::transposed, q, n.P, n.N, false);
                for (int64 s = 0; s < q; ++s)
                    for (int64 p = 0; p < n.P; ++p) dX[s * n.ld + p] *= k.to_end[size_t(s)];
                // E = dY X^T, then M E dt and M G                                               (q,q) = (q,P) (P,q)
                matmul(MEdt.data(), q, dy, HP, Layout::plain, X, n.ld, Layout::transposed, q, q, n.P, false);
                for (int64 s = 0; s < q; ++s) k.tmp2[size_t(s)] = step[s * n.H];
                for (int64 t = 0; t < q; ++t)
                    for (int64 s = 0; s < q; ++s) {
                        const size_t i = size_t(t * q + s);
                        MEdt[i] *= k.decay[i] * k.tmp2[size_t(s)];
                        k.tmp[i] = k.decay[i] * k.CB[i];
                    }
                // inside the chunk                                            (q,P) += (q,q)^T (q,P), (q,N) += (q,q)^T (q,N)
                matmul(dX, n.ld, k.tmp.data(), q, Layout::transposed, dy, HP, Layout::plain, q, n.P, q, true);
                matmul(dB, n.ld, MEdt.data(), q, Layout::transposed, C, n.ld, Layout::plain, q, n.N, q, true);
                // dC: from before the chunk, then inside                       (q,N) = (q,P) (P,N), (q,N) += (q,q) (q,N)
                matmul(dC, n.ld, dy, HP, Layout::plain, S_in, n.N, Layout::plain, q, n.N, n.P, false);
                for (int64 t = 0; t < q; ++t)
                    for (int64 i = 0; i < n.N; ++i) dC[t * n.ld + i] *= k.from_in[size_t(t)];
                matmul(dC, n.ld, MEdt.data(), q, Layout::plain, Bc, n.ld, Layout::plain, q, n.N, q, true);
                // dt, X, and the log-decays, from the last token of the chunk to the first
                T running = S_dot_dS;
                for (int64 t = q - 1; t >= 0; --t) {
                    const int64 r = (k.row0 + t) * n.H + h;
                    ddt[r] = dot(X + t * n.ld, dX + t * n.ld, n.P);
                    for (int64 p = 0; p < n.P; ++p) dX[t * n.ld + p] *= step[t * n.H];
                    running += dot(C + t * n.ld, dC + t * n.ld, n.N) - dot(Bc + t * n.ld, dB + t * n.ld, n.N);
                    ddA[r] = running;
                }
                // dS_in                                                                         (P,N) += (P,q) (q,N)
                for (int64 t = 0; t < q; ++t)
                    for (int64 p = 0; p < n.P; ++p) k.tmp[size_t(t * n.P + p)] = k.from_in[size_t(t)] * dy[t * HP + p];
                for (int64 i = 0; i < PN; ++i) dS[size_t(i)] *= k.from_in_to_end();
                matmul(dS.data(), n.N, k.tmp.data(), n.P, Layout::transposed, C, n.ld, Layout::plain, n.P, n.N, q,
                       true);
                if (dchunk_states) std::copy_n(dS.data(), PN, dchunk_states + (bh * NC + chunk) * PN);
            }
            if (dS_0) std::copy_n(dS.data(), PN, dS_0 + bh * PN);
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 8  Residual: out = w * x + dropout(m)                             x, m, out (rows,D)   w (D), one weight per channel
// ---------------------------------------------------------------------------------------------------------------------

// mask/(1-p) of four neighbouring elements, 4i .. 4i+3. An element is dropped if its random word is below p * 2^32.
template <class T>
static inline void dropout_factors(T* f, const Philox& stream, const Dropout& d, int64 i) {
    const Philox::Block r =
        stream(uint32_t(i), d.key.step, d.key.micro_batch, d.site << 8 | uint32_t(uint64_t(i) >> 32));
    const uint32_t threshold = uint32_t(d.p * 4294967296.0);
    for (int j = 0; j < 4; ++j) f[j] = r.word[j] < threshold ? T(0) : T(1.0 / (1.0 - d.p));
}

template <class T>
void residual_forward(T* out, const T* x, const T* m, const T* w, const Dropout& dropout, int64 rows, int64 D) {
    const Philox stream(dropout.key.seed, "dropout");
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        if (dropout.p == 0) {
            for (int64 d = 0; d < D; ++d) out[r * D + d] = w[d] * x[r * D + d] + m[r * D + d];
            continue;
        }
        T f[4] = {};
        for (int64 d = 0; d < D; ++d) {
            const int64 e = r * D + d;
            if (d == 0 || e % 4 == 0) dropout_factors(f, stream, dropout, e / 4);
            out[e] = w[d] * x[e] + f[e % 4] * m[e];
        }
    }
}

// dx = w dout,  dm = mask/(1-p) dout,  dw += sum_rows dout x. dx may be the same memory as dout.
template <class T>
void residual_backward(T* dx, T* dm, T* dw, const T* dout, const T* x, const T* w, const Dropout& dropout, int64 rows,
                       int64 D) {
    const int64 block = 64;
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 d0 = 0; d0 < D; d0 += block)
        for (int64 r = 0; r < rows; ++r)
            for (int64 d = d0; d < std::min(d0 + block, D); ++d) dw[d] += dout[r * D + d] * x[r * D + d];
    const Philox stream(dropout.key.seed, "dropout");
#pragma omp parallel for schedule(static) if (rows * D > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        T f[4] = {};
        if (dropout.p == 0) std::copy_n(dout + r * D, D, dm + r * D);
        else
            for (int64 d = 0; d < D; ++d) {
                const int64 e = r * D + d;
                if (d == 0 || e % 4 == 0) dropout_factors(f, stream, dropout, e / 4);
                dm[e] = f[e % 4] * dout[e];
            }
        for (int64 d = 0; d < D; ++d) dx[r * D + d] = w[d] * dout[r * D + d];
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 9  SwiGLU: h = silu(g) * u,  silu(g) = g sigmoid(g)                           gate_up (rows,2F): g | u   ->  h (rows,F)
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void swiglu_forward(T* h, const T* gate_up, int64 rows, int64 F) {
#pragma omp parallel for schedule(static) if (rows * F > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        const T *g = gate_up + r * 2 * F, *u = g + F;
        for (int64 f = 0; f < F; ++f) h[r * F + f] = g[f] / (T(1) + exp_(-g[f])) * u[f];
    }
}

// du = dh silu(g);  dg = dh u silu'(g),  silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
template <class T>
void swiglu_backward(T* dgate_up, const T* dh, const T* gate_up, int64 rows, int64 F) {
#pragma omp parallel for schedule(static) if (rows * F > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        const T *g = gate_up + r * 2 * F, *u = g + F, *dhr = dh + r * F;
        T *dg = dgate_up + r * 2 * F, *du = dg + F;
        for (int64 f = 0; f < F; ++f) {
            const T s = T(1) / (T(1) + exp_(-g[f]));
            du[f] = dhr[f] * g[f] * s;
            dg[f] = dhr[f] * u[f] * s * (T(1) + g[f] * (T(1) - s));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 10  Cross-entropy: loss_r = log sum_v exp(z_rv) - z_r,target                            logits z (rows,V), losses (rows)
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
void cross_entropy_forward(T* losses, const T* logits, const int32_t* targets, int64 rows, int64 V) {
#pragma omp parallel if (rows * V > kParallelMin)
    {
        std::vector<T> e(size_t(V), T(0));
#pragma omp for schedule(static)
        for (int64 r = 0; r < rows; ++r) {
            const T* z = logits + r * V;
            const T top = max_of(z, V);
            std::copy_n(z, V, e.data());
            exp_minus(e.data(), top, V);
            losses[r] = std::log(sum(e.data(), V)) + (top - z[targets[r]]);
        }
    }
}

// dz = softmax(z) - onehot(target), times scale. The log of the sum is loss + z_target, so that nothing more was saved.
template <class T>
void cross_entropy_backward(T* logits, const T* losses, const int32_t* targets, double scale, int64 rows, int64 V) {
#pragma omp parallel for schedule(static) if (rows * V > kParallelMin)
    for (int64 r = 0; r < rows; ++r) {
        T* z = logits + r * V;
        const T lse = losses[r] + z[targets[r]];
        for (int64 v = 0; v < V; ++v) z[v] = T(scale) * exp_(z[v] - lse);
        z[targets[r]] -= T(scale);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 11  AdamW (arXiv 1711.05101): m, v running means of g and g^2, corrected for their start at 0
// ---------------------------------------------------------------------------------------------------------------------
//     w -= lr ( (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)  +  weight_decay w )

template <class T>
void adamw_update(T* w, T* m, T* v, const T* g, const AdamW& o, bool decay, double lr, int64 step, double grad_scale,
                  int64 n) {
    const T b1 = T(o.beta1), b2 = T(o.beta2), c1 = T(1 - o.beta1), c2 = T(1 - o.beta2), scale = T(grad_scale);
    const T correction1 = T(1 / (1 - std::pow(o.beta1, double(step))));
    const T correction2 = T(1 / (1 - std::pow(o.beta2, double(step))));
    const T rate = T(lr), eps = T(o.eps), wd = decay ? T(o.weight_decay) : T(0);
#pragma omp parallel for schedule(static) if (n > kParallelMin)
    for (int64 i = 0; i < n; ++i) {
        const T gi = scale * g[i];
        m[i] = b1 * m[i] + c1 * gi;
        v[i] = b2 * v[i] + c2 * gi * gi;
        w[i] -= rate * (m[i] * correction1 / (std::sqrt(v[i] * correction2) + eps) + wd * w[i]);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// 12  The model
// ---------------------------------------------------------------------------------------------------------------------

template <class T>
ModelState<T>::ModelState(const Config& c, int64 sequences, int64 tokens) : layers(size_t(c.L)) {
    B = sequences;
    capacity = tokens;
    for (int64 i = 0; i < c.L; ++i) {
        Layer& layer = layers[size_t(i)];
        if (c.is_attention(i)) {
            layer.k.resize(size_t(B * capacity * c.Hkv * c.P()));
            layer.v.resize(layer.k.size());
        } else {
            layer.S.resize(size_t(B * c.H * c.P() * c.N));
        }
    }
}

// One forward for everything: without a state it is training or evaluation of whole sequences from position 0; with
// one, T_ further tokens of each sequence (a prompt, a part of one, or a single token) continue from (S, K, V,
// position).
template <class T>
double Model<T>::forward(const int32_t* tokens_in, const int32_t* targets_in, int64 sequences, int64 length,
                         const DropoutKey* key, ModelState<T>* state, bool every_token) {
    const Config& c = config;
    const int64 rows = sequences * length, D = c.D, F = c.F;
    if (sequences < 1 || length < 1)
        fail("%lld sequences of %lld tokens: expected at least one of each", (long long)sequences, (long long)length);
    for (int64 r = 0; r < rows; ++r)
        for (const int32_t* t : {tokens_in, targets_in})
            if (t && (t[r] < 0 || t[r] >= c.V))
                fail("token %d is outside the vocabulary of %lld", int(t[r]), (long long)c.V);
    const int64 pos0 = state ? state->position : 0;
    if (state && (state->B != sequences || pos0 + length > state->capacity))
        fail("state has %lld sequences and room for %lld tokens; asked for %lld sequences and %lld tokens",
             (long long)state->B, (long long)state->capacity, (long long)sequences, (long long)(pos0 + length));
    B = sequences;
    T_ = length;
    tokens.assign(tokens_in, tokens_in + rows);
    targets.clear();  // backward() needs a forward that had some
    dropout_on = key && c.dropout > 0;
    if (key) dropout_key = *key;
    rope_qk.extend(c.P(), c.rope_theta, pos0 + T_);
    rope_cb.extend(c.N, c.rope_theta, pos0 + T_);
    ws.m.resize(size_t(rows * D));
    x_final.resize(size_t(rows * D));

    layers[0].x.resize(size_t(rows * D));
    embedding_forward(layers[0].x.data(), tokens.data(), w(Param::word_embed), rows, D);
    see(-1, "embedding", layers[0].x.data(), {B, T_, D});
    for (int64 i = 0; i < c.L; ++i) {
        LayerActivations<T>& a = layers[size_t(i)];
        for (auto* v : {&a.u1, &a.y, &a.x_mid, &a.u2}) v->resize(size_t(rows * D));
        a.rstd1.resize(size_t(rows));
        a.rstd2.resize(size_t(rows));
        a.gate_up.resize(size_t(rows * 2 * F));
        a.h.resize(size_t(rows * F));
        std::vector<T>& x_out = i + 1 < c.L ? layers[size_t(i + 1)].x : x_final;
        x_out.resize(size_t(rows * D));

        rmsnorm_forward(a.u1.data(), a.rstd1.data(), a.x.data(), w(Param::norm1, i), c.norm_eps, rows, D);
        see(i, "norm1", a.u1.data(), {B, T_, D});
        mixer_forward(i, state, pos0);
        linear_forward(ws.m.data(), a.y.data(), w(c.is_attention(i) ? Param::o_proj : Param::out_proj, i), rows, D, D);
        see(i, c.is_attention(i) ? "attn.out" : "ssd.out", ws.m.data(), {B, T_, D});
        residual_forward(a.x_mid.data(), a.x.data(), ws.m.data(), w(Param::res1, i), dropout(i, 0), rows, D);
        see(i, "residual1", a.x_mid.data(), {B, T_, D});
        rmsnorm_forward(a.u2.data(), a.rstd2.data(), a.x_mid.data(), w(Param::norm2, i), c.norm_eps, rows, D);
        see(i, "norm2", a.u2.data(), {B, T_, D});
        linear_forward(a.gate_up.data(), a.u2.data(), w(Param::gate_proj, i), rows, D, 2 * F);  // rows gate, then up
        see(i, "ffn.gate", a.gate_up.data(), {B, T_, F}, 2 * F);
        see(i, "ffn.up", a.gate_up.data() + F, {B, T_, F}, 2 * F);
        swiglu_forward(a.h.data(), a.gate_up.data(), rows, F);
        see(i, "ffn.hidden", a.h.data(), {B, T_, F});
        linear_forward(ws.m.data(), a.h.data(), w(Param::down_proj, i), rows, F, D);
        see(i, "ffn.out", ws.m.data(), {B, T_, D});
        residual_forward(x_out.data(), a.x_mid.data(), ws.m.data(), w(Param::res2, i), dropout(i, 1), rows, D);
        see(i, "residual2", x_out.data(), {B, T_, D});
    }
    u_final.resize(size_t(rows * D));
    rstd_final.resize(size_t(rows));
    rmsnorm_forward(u_final.data(), rstd_final.data(), x_final.data(), w(Param::final_norm), c.norm_eps, rows, D);
    see(-1, "final_norm", u_final.data(), {B, T_, D});
    if (state) state->position += T_;

    const T* head = w(c.tie ? Param::word_embed : Param::lm_head);
    if (!every_token) {  // only the last token of each sequence
        ws.last.resize(size_t(B * D));
        for (int64 b = 0; b < B; ++b) std::copy_n(u_final.data() + ((b + 1) * T_ - 1) * D, D, ws.last.data() + b * D);
        logits.resize(size_t(B * c.V));
        linear_forward(logits.data(), ws.last.data(), head, B, D, c.V);
        see(-1, "logits", logits.data(), {B, 1, c.V});
        return 0;
    }
    logits.resize(size_t(rows * c.V));
    linear_forward(logits.data(), u_final.data(), head, rows, D, c.V);
    see(-1, "logits", logits.data(), {B, T_, c.V});
    if (!targets_in) return 0;
    targets.assign(targets_in, targets_in + rows);
    losses.resize(size_t(rows));
    cross_entropy_forward(losses.data(), logits.data(), targets.data(), rows, c.V);
    see(-1, "losses", losses.data(), {B, T_});
    double total = 0;
    for (const T l : losses) total += double(l);
    return total / double(rows);
}

// u1 -> y: one product makes C|B|X|dt_raw or q|k|v side by side; RoPE turns the first two in place.
template <class T>
void Model<T>::mixer_forward(int64 i, ModelState<T>* state, int64 pos0) {
    const Config& c = config;
    LayerActivations<T>& a = layers[size_t(i)];
    typename ModelState<T>::Layer* past = state ? &state->layers[size_t(i)] : nullptr;
    const int64 rows = B * T_, H = c.H, N = c.N, P = c.P();
    const bool attention = c.is_attention(i);
    const int64 ld = attention ? c.attn_width() : c.ssd_width();
    a.proj.resize(size_t(rows * ld));
    T* proj = a.proj.data();
    linear_forward(proj, a.u1.data(), w(attention ? Param::q_proj : Param::c_proj, i), rows, c.D, ld);
    if (attention) {
        T *q = proj, *k = proj + H * P, *v = k + c.Hkv * P;
        see(i, "attn.q_before_rope", q, {B, T_, H, P}, ld);
        see(i, "attn.k_before_rope", k, {B, T_, c.Hkv, P}, ld);
        see(i, "attn.v", v, {B, T_, c.Hkv, P}, ld);
        rope(q, rope_qk, B, T_, H, ld, pos0, false);
        rope(k, rope_qk, B, T_, c.Hkv, ld, pos0, false);
        see(i, "attn.q", q, {B, T_, H, P}, ld);
        see(i, "attn.k", k, {B, T_, c.Hkv, P}, ld);
        a.lse.resize(size_t(rows * H));
        AttentionShape n{B, T_, T_, H, c.Hkv, P, ld, ld, T_ * ld};
        if (past) {  // append to the cache and attend to all of it
            n.S = pos0 + T_;
            n.ld_kv = c.Hkv * P;
            n.seq_kv = state->capacity * n.ld_kv;
            for (int64 b = 0; b < B; ++b)
                for (int64 t = 0; t < T_; ++t) {
                    const int64 to = b * n.seq_kv + (pos0 + t) * n.ld_kv, from = (b * T_ + t) * ld;
                    std::copy_n(k + from, n.ld_kv, past->k.data() + to);
                    std::copy_n(v + from, n.ld_kv, past->v.data() + to);
                }
            k = past->k.data();
            v = past->v.data();
        }
        attention_forward(a.y.data(), a.lse.data(), q, k, v, n);
        see(i, "attn.lse", a.lse.data(), {B, T_, H});
        see(i, "attn.y", a.y.data(), {B, T_, H, P});
        return;
    }
    T *sc = proj, *sb = sc + H * N, *sx = sb + H * N, *dt_raw = sx + H * P;
    see(i, "ssd.C_before_rope", sc, {B, T_, H, N}, ld);
    see(i, "ssd.B_before_rope", sb, {B, T_, H, N}, ld);
    see(i, "ssd.X", sx, {B, T_, H, P}, ld);
    see(i, "ssd.dt_raw", dt_raw, {B, T_, H}, ld);
    rope(sc, rope_cb, B, T_, H, ld, pos0, false);
    rope(sb, rope_cb, B, T_, H, ld, pos0, false);
    see(i, "ssd.C", sc, {B, T_, H, N}, ld);
    see(i, "ssd.B", sb, {B, T_, H, N}, ld);
    a.dt.resize(size_t(rows * H));
    a.dA.resize(size_t(rows * H));
    ssd_dt_forward(a.dt.data(), a.dA.data(), dt_raw, w(Param::dt_bias, i), w(Param::A_log, i), c.ssd_decay, rows, H,
                   ld);
    see(i, "ssd.dt", a.dt.data(), {B, T_, H});
    see(i, "ssd.dA", a.dA.data(), {B, T_, H});
    const SsdShape n{B, T_, H, P, N, c.Q, ld};
    T* S = past ? past->S.data() : nullptr;
    if (past && T_ == 1) {  // decoding: one step of the recurrence
        ssd_recurrent_forward(a.y.data(), S, sc, sb, sx, a.dt.data(), a.dA.data(), S, n);
    } else if (past) {
        ssd_chunked_forward<T>(a.y.data(), S, nullptr, sc, sb, sx, a.dt.data(), a.dA.data(), S, n);
    } else {
        a.chunk_states.resize(size_t(B * H * c.chunks(T_) * P * N));
        a.final_state.resize(probe ? size_t(B * H * P * N) : 0);
        ssd_chunked_forward<T>(a.y.data(), probe ? a.final_state.data() : nullptr, a.chunk_states.data(), sc, sb, sx,
                               a.dt.data(), a.dA.data(), nullptr, n);
        if (probe) see_chunks(i);
    }
    see(i, "ssd.y", a.y.data(), {B, T_, H, P});
}

template <class T>
void Model<T>::show(const char* kind, int64 layer, const char* name, T* data, const Shape& shape, int64 ld) {
    const std::string where = layer < 0 ? "" : "layers." + std::to_string(layer) + ".";
    int64 width = 1;
    for (size_t i = 2; i < shape.size(); ++i) width *= shape[i];
    probe->see(kind + where + name, data, shape, ld ? ld : width);
}

// The states after each chunk, from those before it: state_out of chunk c is state_in of chunk c+1, and the last one is
// `last` (null: 0).
template <class T>
static std::vector<T> states_out(const std::vector<T>& in, const T* last, int64 heads, int64 NC, int64 PN) {
    std::vector<T> out(in.size(), T(0));
    for (int64 bh = 0; bh < heads; ++bh) {
        std::copy_n(in.data() + (bh * NC + 1) * PN, (NC - 1) * PN, out.data() + bh * NC * PN);
        if (last) std::copy_n(last + bh * PN, PN, out.data() + (bh * NC + NC - 1) * PN);
    }
    return out;
}

// What the chunked form makes on the way: for a probe.
template <class T>
void Model<T>::see_chunks(int64 i) {
    LayerActivations<T>& a = layers[size_t(i)];
    const int64 H = config.H, P = config.P(), N = config.N, NC = config.chunks(T_);
    std::vector<T> cs(a.dA.size());
    chunk_cumsums(cs, a.dA, B, T_, H, config.Q);
    std::vector<T> out = states_out(a.chunk_states, a.final_state.data(), B * H, NC, P * N);
    see(i, "ssd.cs", cs.data(), {B, T_, H});
    see(i, "ssd.state_in", a.chunk_states.data(), {B, H, NC, P, N});
    see(i, "ssd.state_out", out.data(), {B, H, NC, P, N});
    see(i, "ssd.final_state", a.final_state.data(), {B, H, P, N});
}

// Adds scale * d(mean loss) to the gradients: the forward's lines from the last to the first.
template <class T>
void Model<T>::backward(double scale) {
    const Config& c = config;
    const int64 rows = B * T_, D = c.D, F = c.F;
    if (targets.empty()) fail("backward needs a forward with targets before it, each time");
    if (gradients.empty()) gradients.assign(size_t(table.count), T(0));
    for (auto* v : {&ws.dx, &ws.dm, &ws.du, &ws.dy}) v->resize(size_t(rows * D));
    ws.dh.resize(size_t(rows * F));
    ws.dgate_up.resize(size_t(rows * 2 * F));
    T *dx = ws.dx.data(), *dm = ws.dm.data(), *du = ws.du.data();

    cross_entropy_backward(logits.data(), losses.data(), targets.data(), scale / double(rows), rows, c.V);
    see_gradient(-1, "logits", logits.data(), {B, T_, c.V});
    const Param head = c.tie ? Param::word_embed : Param::lm_head;
    linear_backward(du, g(head), logits.data(), u_final.data(), w(head), rows, D, c.V, false);
    see_gradient(-1, "final_norm", du, {B, T_, D});
    std::fill(ws.dx.begin(), ws.dx.end(), T(0));
    rmsnorm_backward(dx, g(Param::final_norm), du, x_final.data(), w(Param::final_norm), rstd_final.data(), rows, D);
    for (int64 i = c.L - 1; i >= 0; --i) {
        LayerActivations<T>& a = layers[size_t(i)];
        see_gradient(i, "residual2", dx, {B, T_, D});
        // x_out = res2 * x_mid + dropout(W_down swiglu(W_gate|up rmsnorm(x_mid)))
        residual_backward(dx, dm, g(Param::res2, i), dx, a.x_mid.data(), w(Param::res2, i), dropout(i, 1), rows, D);
        see_gradient(i, "ffn.out", dm, {B, T_, D});
        linear_backward(ws.dh.data(), g(Param::down_proj, i), dm, a.h.data(), w(Param::down_proj, i), rows, F, D,
                        false);
        see_gradient(i, "ffn.hidden", ws.dh.data(), {B, T_, F});
        swiglu_backward(ws.dgate_up.data(), ws.dh.data(), a.gate_up.data(), rows, F);
        see_gradient(i, "ffn.gate", ws.dgate_up.data(), {B, T_, F}, 2 * F);
        see_gradient(i, "ffn.up", ws.dgate_up.data() + F, {B, T_, F}, 2 * F);
        linear_backward(du, g(Param::gate_proj, i), ws.dgate_up.data(), a.u2.data(), w(Param::gate_proj, i), rows, D,
                        2 * F, false);
        see_gradient(i, "norm2", du, {B, T_, D});
        rmsnorm_backward(dx, g(Param::norm2, i), du, a.x_mid.data(), w(Param::norm2, i), a.rstd2.data(), rows, D);
        see_gradient(i, "residual1", dx, {B, T_, D});
        // x_mid = res1 * x + dropout(W_o mixer(rmsnorm(x)))
        residual_backward(dx, dm, g(Param::res1, i), dx, a.x.data(), w(Param::res1, i), dropout(i, 0), rows, D);
        const Param out = c.is_attention(i) ? Param::o_proj : Param::out_proj;
        see_gradient(i, c.is_attention(i) ? "attn.out" : "ssd.out", dm, {B, T_, D});
        linear_backward(ws.dy.data(), g(out, i), dm, a.y.data(), w(out, i), rows, D, D, false);
        mixer_backward(i);
        see_gradient(i, "norm1", du, {B, T_, D});
        rmsnorm_backward(dx, g(Param::norm1, i), du, a.x.data(), w(Param::norm1, i), a.rstd1.data(), rows, D);
    }
    see_gradient(-1, "embedding", dx, {B, T_, D});
    embedding_backward(g(Param::word_embed), dx, tokens.data(), rows, D);
    targets.clear();  // logits now hold their gradient: a second backward would be wrong
}

// ws.dy -> ws.du, and the gradients of the mixer's parameters
template <class T>
void Model<T>::mixer_backward(int64 i) {
    const Config& c = config;
    LayerActivations<T>& a = layers[size_t(i)];
    const int64 rows = B * T_, H = c.H, N = c.N, P = c.P();
    const bool attention = c.is_attention(i);
    const int64 ld = attention ? c.attn_width() : c.ssd_width();
    ws.dproj.resize(size_t(rows * ld));
    T *d = ws.dproj.data(), *proj = a.proj.data();
    if (attention) {
        const int64 k = H * P, v = k + c.Hkv * P;
        const AttentionShape n{B, T_, T_, H, c.Hkv, P, ld, ld, T_ * ld};
        see_gradient(i, "attn.y", ws.dy.data(), {B, T_, H, P});
        attention_backward(d, d + k, d + v, ws.dy.data(), proj, proj + k, proj + v, a.y.data(), a.lse.data(), n);
        see_gradient(i, "attn.v", d + v, {B, T_, c.Hkv, P}, ld);
        see_gradient(i, "attn.k", d + k, {B, T_, c.Hkv, P}, ld);
        see_gradient(i, "attn.q", d, {B, T_, H, P}, ld);
        rope(d, rope_qk, B, T_, H, ld, 0, true);
        rope(d + k, rope_qk, B, T_, c.Hkv, ld, 0, true);
        see_gradient(i, "attn.k_before_rope", d + k, {B, T_, c.Hkv, P}, ld);
        see_gradient(i, "attn.q_before_rope", d, {B, T_, H, P}, ld);
    } else {
        const int64 b = H * N, x = 2 * H * N, dt = x + H * P;
        const SsdShape n{B, T_, H, P, N, c.Q, ld};
        ws.ddt.resize(size_t(rows * H));
        ws.ddA.resize(size_t(rows * H));
        const T* cotangent = probe ? probe->final_state_cotangent(i) : nullptr;
        std::vector<T> dstates(probe ? a.chunk_states.size() : 0);
        see_gradient(i, "ssd.y", ws.dy.data(), {B, T_, H, P});
        ssd_chunked_backward<T>(d, d + b, d + x, ws.ddt.data(), ws.ddA.data(), nullptr,
                                probe ? dstates.data() : nullptr, ws.dy.data(), cotangent, proj, proj + b, proj + x,
                                a.dt.data(), a.dA.data(), a.chunk_states.data(), n);
        ssd_dt_backward(d + dt, g(Param::dt_bias, i), g(Param::A_log, i), ws.ddt.data(), ws.ddA.data(), proj + dt,
                        w(Param::dt_bias, i), w(Param::A_log, i), a.dA.data(), c.ssd_decay, rows, H, ld);
        if (probe) {
            std::vector<T> dstates_out = states_out(dstates, cotangent, B * H, c.chunks(T_), P * N);
            see_gradient(i, "ssd.state_out", dstates_out.data(), {B, H, c.chunks(T_), P, N});
            see_gradient(i, "ssd.state_in", dstates.data(), {B, H, c.chunks(T_), P, N});
            for (int64 r = 0; c.ssd_decay && r < rows * H; ++r)  // all of dt's gradient: also what comes through dA
                ws.ddt[size_t(r)] -= std::exp(*(w(Param::A_log, i) + r % H)) * ws.ddA[size_t(r)];
        }
        see_gradient(i, "ssd.X", d + x, {B, T_, H, P}, ld);
        see_gradient(i, "ssd.B", d + b, {B, T_, H, N}, ld);
        see_gradient(i, "ssd.C", d, {B, T_, H, N}, ld);
        see_gradient(i, "ssd.dA", ws.ddA.data(), {B, T_, H});
        see_gradient(i, "ssd.dt", ws.ddt.data(), {B, T_, H});
        see_gradient(i, "ssd.dt_raw", d + dt, {B, T_, H}, ld);
        rope(d, rope_cb, B, T_, H, ld, 0, true);
        rope(d + b, rope_cb, B, T_, H, ld, 0, true);
        see_gradient(i, "ssd.B_before_rope", d + b, {B, T_, H, N}, ld);
        see_gradient(i, "ssd.C_before_rope", d, {B, T_, H, N}, ld);
    }
    const Param first = attention ? Param::q_proj : Param::c_proj;
    linear_backward(ws.du.data(), g(first, i), d, a.u1.data(), w(first, i), rows, c.D, ld, false);
}

template <class T>
static std::string find_bad(const std::vector<T>& v, const std::string& name) {
    for (size_t i = 0; i < v.size(); ++i)
        if (!std::isfinite(v[i]))
            return format("%s, element %zu, is %s", name.c_str(), i, std::isnan(v[i]) ? "nan" : "infinite");
    return "";
}

template <class T>
std::string Model<T>::find_non_finite() const {
    const auto parameters = [&](const std::vector<T>& v, const char* what) -> std::string {
        for (size_t i = 0; i < v.size(); ++i)
            if (!std::isfinite(v[i])) {
                const ParamSpec& s = table.at(int64(i));
                return format("%s %s, element %lld, is %s", what, s.name.c_str(), (long long)(int64(i) - s.offset),
                              std::isnan(v[i]) ? "nan" : "infinite");
            }
        return "";
    };
    std::string bad = parameters(weights, "weight");
    for (size_t i = 0; bad.empty() && i < layers.size(); ++i) {
        const LayerActivations<T>& a = layers[i];
        const std::pair<const char*, const std::vector<T>*> in_order[] = {{"input", &a.x},
                                                                          {"norm1 output", &a.u1},
                                                                          {"mixer projection", &a.proj},
                                                                          {"dt", &a.dt},
                                                                          {"chunk state", &a.chunk_states},
                                                                          {"mixer output", &a.y},
                                                                          {"residual", &a.x_mid},
                                                                          {"norm2 output", &a.u2},
                                                                          {"gate and up", &a.gate_up},
                                                                          {"feed-forward hidden", &a.h}};
        for (const auto& t : in_order)
            if (bad.empty()) bad = find_bad(*t.second, format("activation layers.%zu %s", i, t.first));
    }
    if (bad.empty()) bad = find_bad(x_final, "activation final input");
    if (bad.empty()) bad = find_bad(logits, "activation logits");
    if (bad.empty()) bad = parameters(gradients, "gradient");
    return bad;
}

// ---------------------------------------------------------------------------------------------------------------------
// 13  The engine
// ---------------------------------------------------------------------------------------------------------------------

void save_state(const Config& config, const ModelState<float>& s, const std::string& path) {
    const int64 row = config.Hkv * config.P();
    std::vector<std::vector<float>> used;  // K and V without the room that is still free
    std::vector<TensorView> tensors;
    used.reserve(size_t(2 * config.L));
    for (int64 i = 0; i < config.L; ++i) {
        const std::string prefix = format("layers.%lld.", (long long)i);
        const auto& layer = s.layers[size_t(i)];
        if (!config.is_attention(i)) {
            tensors.push_back(
                {prefix + "ssm_state", DType::F32, {s.B, config.H, config.P(), config.N}, layer.S.data()});
            continue;
        }
        for (const auto* cache : {&layer.k, &layer.v}) {
            used.emplace_back();
            for (int64 b = 0; b < s.B; ++b) {
                const float* from = cache->data() + b * s.capacity * row;
                used.back().insert(used.back().end(), from, from + s.position * row);
            }
            tensors.push_back({prefix + (cache == &layer.k ? "k" : "v"),
                               DType::F32,
                               {s.B, s.position, config.Hkv, config.P()},
                               used.back().data()});
        }
    }
    tensors.push_back({"position", DType::I64, {1}, &s.position});
    tensors.push_back({"batch", DType::I64, {1}, &s.B});
    write_safetensors(path, tensors);
}

std::unique_ptr<ModelState<float>> load_state(const Config& config, const std::string& path, int64 capacity) {
    const SafeTensors f(path);
    const auto entry = [&](const std::string& name) -> const SafeTensors::Entry& {
        const SafeTensors::Entry* e = f.find(name);
        if (!e) fail("%s: tensor '%s' is missing", path.c_str(), name.c_str());
        return *e;
    };
    const int64 position = f.read_integer(entry("position")), B = f.read_integer(entry("batch"));
    if (position < 0 || position > capacity || B < 1 || B > INT32_MAX)
        fail("%s: position %lld, batch %lld: expected a position of 0..%lld (the capacity), a batch of at least 1",
             path.c_str(), (long long)position, (long long)B, (long long)capacity);
    // Every shape is looked at before anything is allocated: a corrupt batch must not ask for all memory.
    const Shape S_shape = {B, config.H, config.P(), config.N}, kv_shape = {B, position, config.Hkv, config.P()};
    const auto checked = [&](int64 layer, const char* what) -> const SafeTensors::Entry& {
        const SafeTensors::Entry& e = entry(format("layers.%lld.%s", (long long)layer, what));
        const Shape& want = config.is_attention(layer) ? kv_shape : S_shape;
        if (e.shape != want)
            fail("%s: tensor '%s' has shape %s, expected %s", path.c_str(), e.name.c_str(), to_text(e.shape).c_str(),
                 to_text(want).c_str());
        return e;
    };
    size_t expected = 2;  // position, batch
    for (int64 i = 0; i < config.L; ++i)
        for (const char* what : {"ssm_state", "k", "v"})
            if ((what[0] == 's') != config.is_attention(i)) {
                checked(i, what);
                ++expected;
            }
    if (f.entries.size() != expected)
        fail("%s: %zu tensors, expected %zu: this is the state of another model", path.c_str(), f.entries.size(),
             expected);
    auto s = std::make_unique<ModelState<float>>(config, B, capacity);
    s->position = position;
    const int64 row = config.Hkv * config.P();
    std::vector<float> used(size_t(B * position * row));
    for (int64 i = 0; i < config.L; ++i) {
        auto& layer = s->layers[size_t(i)];
        if (!config.is_attention(i)) {
            f.read(checked(i, "ssm_state"), layer.S.data());
            continue;
        }
        for (auto* cache : {&layer.k, &layer.v}) {
            f.read(checked(i, cache == &layer.k ? "k" : "v"), used.data());
            for (int64 b = 0; b < B; ++b)
                std::copy_n(used.data() + b * position * row, position * row, cache->data() + b * capacity * row);
        }
    }
    return s;
}

class CpuEngine : public Engine {
  public:
    explicit CpuEngine(const Config& c) : Engine(c), model(c) {}
    std::string device() const override {
#ifdef _OPENMP
        return format("CPU, %d threads, fp32", thread_limit());
#else
        return "CPU, 1 thread (built without OpenMP), fp32";
#endif
    }
    void write(Buffer which, const float* host) override {
        std::vector<float>& v = buffer(which);
        v.assign(host, host + table.count);
    }
    void read(Buffer which, float* host) const override {
        const std::vector<float>& v = const_cast<CpuEngine*>(this)->buffer(which);
        if (v.empty()) std::fill_n(host, table.count, 0.0f);  // not in use yet
        else std::copy(v.begin(), v.end(), host);
    }
    double forward(const int32_t* tokens, const int32_t* targets, int64 B, int64 T,
                   const DropoutKey* dropout) override {
        return model.forward(tokens, targets, B, T, dropout, nullptr);
    }
    void backward(double scale) override { model.backward(scale); }
    void zero_gradients() override { model.gradients.assign(size_t(table.count), 0.0f); }
    double gradient_norm() override {
        // Blocks of fixed size, so that the order of the sum does not depend on the number of threads.
        const std::vector<float>& v = model.gradients;
        const int64 n = int64(v.size()), block = 4096, blocks = (n + block - 1) / block;
        std::vector<double> partial(size_t(blocks), 0.0);
#pragma omp parallel for schedule(static) if (n > kParallelMin)
        for (int64 i = 0; i < blocks; ++i)
            for (int64 j = i * block; j < std::min(n, (i + 1) * block); ++j)
                partial[size_t(i)] += double(v[size_t(j)]) * double(v[size_t(j)]);
        double total = 0;
        for (const double p : partial) total += p;
        return std::sqrt(total);
    }
    void update(const AdamW& o, double lr, int64 step, double grad_scale) override {
        buffer(Buffer::gradients).resize(size_t(table.count));
        buffer(Buffer::exp_avg).resize(size_t(table.count));
        buffer(Buffer::exp_avg_sq).resize(size_t(table.count));
        for (const ParamSpec& s : table.specs)
            adamw_update(&model.weights[size_t(s.offset)], &exp_avg[size_t(s.offset)], &exp_avg_sq[size_t(s.offset)],
                         &model.gradients[size_t(s.offset)], o, s.decay, lr, step, grad_scale, s.count);
    }
    std::string find_non_finite() const override { return model.find_non_finite(); }

    std::unique_ptr<State> new_state(int64 B, int64 capacity) const override {
        return std::make_unique<ModelState<float>>(config, B, capacity);
    }
    void step(State& state, const int32_t* tokens, int64 n, float* logits, bool every_token) override {
        model.forward(tokens, nullptr, state.B, n, nullptr, &static_cast<ModelState<float>&>(state), every_token);
        std::copy(model.logits.begin(), model.logits.end(), logits);
    }
    void save_state(const State& state, const std::string& path) const override {
        ref::save_state(config, static_cast<const ModelState<float>&>(state), path);
    }
    std::unique_ptr<State> load_state(const std::string& path, int64 capacity) const override {
        return ref::load_state(config, path, capacity);
    }

  private:
    Model<float> model;
    std::vector<float> exp_avg, exp_avg_sq;  // made at the first update

    std::vector<float>& buffer(Buffer which) {
        switch (which) {
            case Buffer::weights: return model.weights;
            case Buffer::gradients: return model.gradients;
            case Buffer::exp_avg: return exp_avg;
            default: return exp_avg_sq;
        }
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 14  Gradient check
// ---------------------------------------------------------------------------------------------------------------------
// f'(x) = (8 (f(x+h) - f(x-h)) - (f(x+2h) - f(x-2h))) / 12h + O(h^4), in double, for every element of every input. Each op
// is made a scalar by a random weighting of all its outputs, which is also the gradient that its backward is given.

namespace {

using Vec = std::vector<double>;
struct Tensor {
    const char* name;
    Vec value;
};

Vec random_vector(const char* name, int64 n, double scale, double mean = 0) {
    const Philox stream(7, name);
    Vec v(static_cast<size_t>(n));
    for (int64 i = 0; i < n; ++i) v[size_t(i)] = mean + scale * stream.normal_at(uint64_t(i));
    return v;
}

double inner(const Vec& a, const Vec& b) {
    double s = 0;
    for (size_t i = 0; i < a.size(); ++i) s += a[i] * b[i];
    return s;
}

double difference_quotient(const std::function<double()>& f, double* x) {
    const double h = 2e-4, at = *x;
    const auto value = [&](double shift) {
        *x = at + shift;
        const double y = f();
        *x = at;
        return y;
    };
    return (8 * (value(h) - value(-h)) - (value(2 * h) - value(-2 * h))) / (12 * h);
}

// NaN anywhere makes the result NaN, and a gradient that vanishes altogether proves nothing: infinity.
double relative_difference(const Vec& a, const Vec& reference) {
    double d = 0, n = 0;
    for (size_t i = 0; i < reference.size(); ++i) {
        d += (a[i] - reference[i]) * (a[i] - reference[i]);
        n += reference[i] * reference[i];
    }
    return n == 0 ? HUGE_VAL : std::sqrt(d / n);
}

// loss() reads the inputs; gradients() returns d loss / d input for each, by the backward under test.
void check_op(std::vector<GradientError>* report, const std::string& op, std::vector<Tensor>& inputs,
              const std::function<double()>& loss, const std::function<std::vector<Vec>()>& gradients) {
    const std::vector<Vec> claimed = gradients();
    for (size_t k = 0; k < inputs.size(); ++k) {
        Vec numeric(inputs[k].value.size());
        for (size_t i = 0; i < numeric.size(); ++i) numeric[i] = difference_quotient(loss, &inputs[k].value[i]);
        report->push_back({op, inputs[k].name, relative_difference(claimed[k], numeric)});
    }
}

void check_linear(std::vector<GradientError>* report) {
    const int64 rows = 5, in = 7, out = 9;
    std::vector<Tensor> t = {{"x", random_vector("x", rows * in, 1)}, {"w", random_vector("w", out * in, 1)}};
    const Vec dy = random_vector("dy", rows * out, 1);
    check_op(
        report, "linear", t,
        [&] {
            Vec y(dy.size());
            linear_forward(y.data(), t[0].value.data(), t[1].value.data(), rows, in, out);
            return inner(y, dy);
        },
        [&] {
            Vec dx(t[0].value.size()), dw(t[1].value.size());
            linear_backward(dx.data(), dw.data(), dy.data(), t[0].value.data(), t[1].value.data(), rows, in, out,
                            false);
            return std::vector<Vec>{dx, dw};
        });
}

void check_embedding(std::vector<GradientError>* report) {
    const int64 rows = 6, V = 4, D = 3;
    const int32_t tokens[] = {2, 0, 2, 3, 1, 2};
    std::vector<Tensor> t = {{"embed", random_vector("embed", V * D, 1)}};
    const Vec dx = random_vector("dx", rows * D, 1);
    check_op(
        report, "embedding", t,
        [&] {
            Vec x(dx.size());
            embedding_forward(x.data(), tokens, t[0].value.data(), rows, D);
            return inner(x, dx);
        },
        [&] {
            Vec dembed(t[0].value.size());
            embedding_backward(dembed.data(), dx.data(), tokens, rows, D);
            return std::vector<Vec>{dembed};
        });
}

void check_rmsnorm(std::vector<GradientError>* report) {
    const int64 rows = 4, D = 37;  // more than one block of lanes in double
    std::vector<Tensor> t = {{"x", random_vector("x", rows * D, 1)}, {"w", random_vector("w", D, 0.2, 1)}};
    const Vec du = random_vector("du", rows * D, 1);
    Vec rstd(size_t(rows), 0.0);
    const auto forward = [&] {
        Vec u(du.size());
        rmsnorm_forward(u.data(), rstd.data(), t[0].value.data(), t[1].value.data(), 1e-2, rows, D);
        return inner(u, du);
    };
    check_op(report, "rmsnorm", t, forward, [&] {
        Vec dx(t[0].value.size()), dw(t[1].value.size());
        forward();
        rmsnorm_backward(dx.data(), dw.data(), du.data(), t[0].value.data(), t[1].value.data(), rstd.data(), rows, D);
        return std::vector<Vec>{dx, dw};
    });
}

void check_rope(std::vector<GradientError>* report) {
    const int64 B = 2, T = 3, H = 2, d = 6, ld = H * d + 1;
    std::vector<Tensor> t = {{"x", random_vector("x", B * T * ld, 1)}};
    const Vec dy = random_vector("dy", B * T * ld, 1);
    RopeTable<double> table;
    table.extend(d, 10000, 9);
    check_op(
        report, "rope", t,
        [&] {
            Vec y = t[0].value;
            rope(y.data(), table, B, T, H, ld, 5, false);
            return inner(y, dy);
        },
        [&] {
            Vec dx = dy;
            rope(dx.data(), table, B, T, H, ld, 5, true);
            return std::vector<Vec>{dx};
        });
}

void check_attention(std::vector<GradientError>* report) {
    const int64 B = 2, T = 4, S = 6, H = 4, Hkv = 2, P = 6;  // two keys of an earlier call, two query heads per kv head
    const AttentionShape n{B, T, S, H, Hkv, P, H * P, Hkv * P, S * Hkv * P};
    std::vector<Tensor> t = {{"q", random_vector("q", B * T * H * P, 1)},
                             {"k", random_vector("k", B * S * Hkv * P, 1)},
                             {"v", random_vector("v", B * S * Hkv * P, 1)}};
    const Vec dy = random_vector("dy", B * T * H * P, 1);
    Vec y(dy.size()), lse(size_t(B * T * H));
    const auto forward = [&] {
        attention_forward(y.data(), lse.data(), t[0].value.data(), t[1].value.data(), t[2].value.data(), n);
        return inner(y, dy);
    };
    check_op(report, "attention", t, forward, [&] {
        Vec dq(t[0].value.size()), dk(t[1].value.size()), dv(t[2].value.size());
        forward();
        attention_backward(dq.data(), dk.data(), dv.data(), dy.data(), t[0].value.data(), t[1].value.data(),
                           t[2].value.data(), y.data(), lse.data(), n);
        return std::vector<Vec>{dq, dk, dv};
    });
}

void check_ssd_dt(std::vector<GradientError>* report) {
    const int64 rows = 6, H = 3;
    std::vector<Tensor> t = {{"dt_raw", random_vector("dt_raw", rows * H, 2)},
                             {"dt_bias", random_vector("dt_bias", H, 1)},
                             {"A_log", random_vector("A_log", H, 0.5)}};
    t[0].value[4] = 25;  // the linear part of softplus
    const Vec ddt = random_vector("ddt", rows * H, 1), ddA = random_vector("ddA", rows * H, 1);
    Vec dt(ddt.size()), dA(ddt.size());
    const auto forward = [&] {
        ssd_dt_forward(dt.data(), dA.data(), t[0].value.data(), t[1].value.data(), t[2].value.data(), true, rows, H, H);
        return inner(dt, ddt) + inner(dA, ddA);
    };
    check_op(report, "ssd dt", t, forward, [&] {
        Vec draw(t[0].value.size()), dbias(t[1].value.size()), dlog(t[2].value.size());
        forward();
        ssd_dt_backward(draw.data(), dbias.data(), dlog.data(), ddt.data(), ddA.data(), t[0].value.data(),
                        t[1].value.data(), t[2].value.data(), dA.data(), true, rows, H, H);
        return std::vector<Vec>{draw, dbias, dlog};
    });
}

// All three forms, with N != P, a ragged last chunk, an initial state and a gradient on the final state.
void check_ssd(std::vector<GradientError>* report, const char* form) {
    const int64 B = 2, T = 7, H = 2, P = 3, N = 4;
    const SsdShape n{B, T, H, P, N, 3, H * (2 * N + P)};
    std::vector<Tensor> t = {{"C,B,X", random_vector("cbx", B * T * n.ld, 1)},
                             {"dt", random_vector("dt", B * T * H, 0.3, 1)},
                             {"dA", random_vector("dA", B * T * H, 0.2, -0.6)},
                             {"S_0", random_vector("S_0", B * H * P * N, 1)}};
    const Vec dY = random_vector("dY", B * T * H * P, 1), dS_T = random_vector("dS_T", B * H * P * N, 1);
    const int64 b = H * N, x = 2 * H * N;
    const char kind = form[0];
    Vec Y(dY.size()), S_T(dS_T.size()), chunk_states(size_t(B * H * 3 * P * N));
    const auto forward = [&] {
        const double *p = t[0].value.data(), *dt = t[1].value.data(), *dA = t[2].value.data(), *S_0 = t[3].value.data();
        if (kind == 'r') ssd_recurrent_forward(Y.data(), S_T.data(), p, p + b, p + x, dt, dA, S_0, n);
        if (kind == 'q') ssd_quadratic_forward(Y.data(), S_T.data(), p, p + b, p + x, dt, dA, S_0, n);
        if (kind == 'c')
            ssd_chunked_forward(Y.data(), S_T.data(), chunk_states.data(), p, p + b, p + x, dt, dA, S_0, n);
        return inner(Y, dY) + inner(S_T, dS_T);
    };
    check_op(report, std::string("ssd ") + form, t, forward, [&] {
        Vec d(t[0].value.size()), ddt(t[1].value.size()), ddA(t[2].value.size()), dS_0(t[3].value.size());
        const double *p = t[0].value.data(), *dt = t[1].value.data(), *dA = t[2].value.data(), *S_0 = t[3].value.data();
        double* q = d.data();
        forward();
        if (kind == 'r')
            ssd_recurrent_backward(q, q + b, q + x, ddt.data(), ddA.data(), dS_0.data(), dY.data(), dS_T.data(), p,
                                   p + b, p + x, dt, dA, S_0, n);
        if (kind == 'q')
            ssd_quadratic_backward(q, q + b, q + x, ddt.data(), ddA.data(), dS_0.data(), dY.data(), dS_T.data(), p,
                                   p + b, p + x, dt, dA, S_0, n);
        if (kind == 'c')
            ssd_chunked_backward<double>(q, q + b, q + x, ddt.data(), ddA.data(), dS_0.data(), nullptr, dY.data(),
                                         dS_T.data(), p, p + b, p + x, dt, dA, chunk_states.data(), n);
        return std::vector<Vec>{d, ddt, ddA, dS_0};
    });
}

void check_residual(std::vector<GradientError>* report, double p) {
    const int64 rows = 5, D = 6;
    std::vector<Tensor> t = {{"x", random_vector("x", rows * D, 1)},
                             {"m", random_vector("m", rows * D, 1)},
                             {"w", random_vector("w", D, 0.2, 1)}};
    const Vec dout = random_vector("dout", rows * D, 1);
    const Dropout dropout{p, {3, 1, 0}, 2};
    check_op(
        report, p > 0 ? "residual, dropout" : "residual", t,
        [&] {
            Vec out(dout.size());
            residual_forward(out.data(), t[0].value.data(), t[1].value.data(), t[2].value.data(), dropout, rows, D);
            return inner(out, dout);
        },
        [&] {
            Vec dx(dout.size()), dm(dout.size()), dw(t[2].value.size());
            residual_backward(dx.data(), dm.data(), dw.data(), dout.data(), t[0].value.data(), t[2].value.data(),
                              dropout, rows, D);
            return std::vector<Vec>{dx, dm, dw};
        });
}

void check_swiglu(std::vector<GradientError>* report) {
    const int64 rows = 3, F = 5;
    std::vector<Tensor> t = {{"gate,up", random_vector("gate_up", rows * 2 * F, 2)}};
    const Vec dh = random_vector("dh", rows * F, 1);
    check_op(
        report, "swiglu", t,
        [&] {
            Vec h(dh.size());
            swiglu_forward(h.data(), t[0].value.data(), rows, F);
            return inner(h, dh);
        },
        [&] {
            Vec d(t[0].value.size());
            swiglu_backward(d.data(), dh.data(), t[0].value.data(), rows, F);
            return std::vector<Vec>{d};
        });
}

void check_cross_entropy(std::vector<GradientError>* report) {
    const int64 rows = 4, V = 7;
    const int32_t targets[] = {3, 0, 6, 3};
    std::vector<Tensor> t = {{"logits", random_vector("logits", rows * V, 3)}};
    Vec losses(static_cast<size_t>(rows));
    const auto forward = [&] {
        cross_entropy_forward(losses.data(), t[0].value.data(), targets, rows, V);
        return 0.25 * inner(losses, Vec(size_t(rows), 1.0));
    };
    check_op(report, "cross-entropy", t, forward, [&] {
        forward();
        Vec d = t[0].value;
        cross_entropy_backward(d.data(), losses.data(), targets, 0.25, rows, V);
        return std::vector<Vec>{d};
    });
}

// A hybrid of three layers with everything that can go wrong: GQA, N != P, a ragged chunk, dropout, tied or not.
void check_model(std::vector<GradientError>* report, bool tie) {
    Config c;
    c.V = 11;
    c.D = 12;
    c.L = 3;
    c.H = 2;
    c.Hkv = 1;
    c.N = 4;
    c.F = 10;
    c.Q = 3;
    c.T = 7;
    c.attn_period = 3;
    c.attn_offset = 1;
    c.dropout = 0.2;
    c.tie = tie;
    Model<double> m(c);
    for (const ParamSpec& s : m.table.specs) {  // large enough that no gradient vanishes
        const bool one = s.init == Init::ones;
        const Vec v = random_vector(s.name.c_str(), s.count, s.shape.size() == 2 ? 0.3 : 0.2, one ? 1 : 0);
        std::copy(v.begin(), v.end(), m.weights.begin() + s.offset);
    }
    const int64 B = 2, rows = B * c.T;
    std::vector<int32_t> tokens(static_cast<size_t>(rows)), targets(tokens.size());
    for (int64 r = 0; r < rows; ++r) {
        tokens[size_t(r)] = int32_t((r * 7 + 3) % c.V);
        targets[size_t(r)] = int32_t((r * 5 + 1) % c.V);
    }
    const DropoutKey key{5, 2, 1};
    const auto loss = [&] { return m.forward(tokens.data(), targets.data(), B, c.T, &key, nullptr); };
    loss();
    m.backward(1);
    for (const ParamSpec& s : m.table.specs) {
        Vec numeric(static_cast<size_t>(s.count));
        for (int64 i = 0; i < s.count; ++i)
            numeric[size_t(i)] = difference_quotient(loss, &m.weights[size_t(s.offset + i)]);
        const Vec claimed(m.gradients.begin() + s.offset, m.gradients.begin() + s.offset + s.count);
        report->push_back(
            {tie ? "model, tied head" : "model, untied head", s.name, relative_difference(claimed, numeric)});
    }
}

}  // namespace

std::vector<GradientError> gradient_check() {
    std::vector<GradientError> report;
    check_embedding(&report);
    check_linear(&report);
    check_rmsnorm(&report);
    check_rope(&report);
    check_attention(&report);
    check_ssd_dt(&report);
    for (const char* form : {"recurrent", "quadratic", "chunked"}) check_ssd(&report, form);
    check_residual(&report, 0);
    check_residual(&report, 0.4);
    check_swiglu(&report);
    check_cross_entropy(&report);
    check_model(&report, true);
    check_model(&report, false);
    return report;
}

// ---------------------------------------------------------------------------------------------------------------------
// 15  Benchmark, and the gradient check as a command
// ---------------------------------------------------------------------------------------------------------------------

#ifdef REF_CPU_MAIN
namespace {

double seconds() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Median seconds of one call: two calls to warm up, then as many as fit into about `budget` seconds, 5 to 1000.
double median_seconds(const std::function<void()>& call, double budget) {
    call();
    double start = seconds();
    call();
    const double once = std::max(seconds() - start, 1e-7);
    const int repeats = int(std::min(std::max(budget / once, 5.0), 1000.0));
    std::vector<double> times;
    for (int i = 0; i < repeats; ++i) {
        start = seconds();
        call();
        times.push_back(seconds() - start);
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
}

int bench_command(int argc, char** argv) {
    std::string name = "5m";
    int64 B = 4, length = 0, decode_tokens = 256;
    Options o("ref_cpu",
              "ref_cpu bench [options]\n\nTimes a train step, decoding and the matrix product; prints medians.");
    o.add("preset", &name, "model");
    o.add("batch", &B, "sequences of a train step", 1, 1 << 20);
    o.add("seq-len", &length, "tokens of a sequence; 0: the preset's", 0, 1 << 24);
    o.add("tokens", &decode_tokens, "tokens to decode after a prompt of 64", 16, 1 << 24);
    if (!o.parse(argc, argv, 1)) return 0;
    const Config c = preset(name);
    if (length == 0) length = c.T;
    const auto engine = make_cpu_engine(c);
    engine->write(Buffer::weights, initial_weights(c, 1).data());
    printf("model %s, %lld parameters, %s\n\n", name.c_str(), (long long)engine->table.count, engine->device().c_str());

    const Philox stream(1, "bench");
    const int64 rows = B * length;
    std::vector<int32_t> tokens(size_t(rows + 1));
    for (int64 r = 0; r <= rows; ++r) tokens[size_t(r)] = int32_t(stream.at(uint64_t(r)).word[0] % uint32_t(c.V));
    double forward = 0, backward = 0, update = 0;
    int64 step = 0;
    {
        std::vector<double> f, b, u, all;
        for (int i = 0; i < 14; ++i) {
            const double t0 = seconds();
            engine->forward(tokens.data(), tokens.data() + 1, B, length);
            const double t1 = seconds();
            engine->zero_gradients();
            engine->backward(1);
            const double t2 = seconds();
            const double norm = engine->gradient_norm();
            engine->update(AdamW(), 1e-4, ++step, norm > 1 ? 1 / norm : 1);
            const double t3 = seconds();
            if (i < 3) continue;  // warm-up
            f.push_back(t1 - t0);
            b.push_back(t2 - t1);
            u.push_back(t3 - t2);
            all.push_back(t3 - t0);
        }
        const auto median = [](std::vector<double>& v) {
            std::sort(v.begin(), v.end());
            return v[v.size() / 2];
        };
        forward = median(f);
        backward = median(b);
        update = median(u);
        const double total = median(all);
        printf(
            "train step   B %lld x T %lld   %8.1f ms   %8.0f tokens/s   (forward %.1f, backward %.1f, clip and AdamW %.1f)\n",
            (long long)B, (long long)length, 1e3 * total, double(rows) / total, 1e3 * forward, 1e3 * backward,
            1e3 * update);
    }
    {
        const int64 prompt = std::min<int64>(64, rows);
        std::vector<float> logits(static_cast<size_t>(c.V));
        std::vector<double> times;
        const Sampler greedy = [] {
            Sampler s;
            s.temperature = 0;
            return s;
        }();
        const auto state = engine->new_state(1, prompt + decode_tokens);
        engine->step(*state, tokens.data(), prompt, logits.data());
        for (int64 i = 0; i < decode_tokens; ++i) {
            const double start = seconds();
            const int32_t next = greedy.choose(logits.data(), c.V, 0);
            engine->step(*state, &next, 1, logits.data());
            times.push_back(seconds() - start);
        }
        std::sort(times.begin(), times.end());
        const double t = times[times.size() / 2];
        printf("decode       B 1, greedy      %8.3f ms   %8.0f tokens/s   (%.1f GB/s of weights)\n", 1e3 * t, 1 / t,
               4e-9 * double(engine->table.count) / t);
    }
    printf("\nmatmul, GFLOP/s   rows     in    out   y = x W^T   dx = dy W   dW += dy^T x\n");
    const std::pair<int64, int64> layers[] = {
        {c.D, c.ssd_width()}, {c.D, c.D}, {c.D, 2 * c.F}, {c.F, c.D}, {1024, 1024}};
    for (const auto& l : layers) {
        const int64 in = l.first, out = l.second;
        std::vector<float> x(size_t(rows * in), 0.5f), w(size_t(in * out), 0.25f), y(size_t(rows * out), 0.125f);
        const double flop = 2e-9 * double(rows) * double(in) * double(out);
        const double f = median_seconds([&] { linear_forward(y.data(), x.data(), w.data(), rows, in, out); }, 0.3);
        const double b = median_seconds(
            [&] {
                matmul(x.data(), in, y.data(), out, Layout::plain, w.data(), in, Layout::plain, rows, in, out, false);
            },
            0.3);
        std::fill(y.begin(), y.end(), 0.0f);
        const double d = median_seconds(
            [&] {
                matmul(w.data(), in, y.data(), out, Layout::transposed, x.data(), in, Layout::plain, out, in, rows,
                       true);
            },
            0.3);
        printf("%22lld %6lld %6lld %11.1f %11.1f %14.1f\n", (long long)rows, (long long)in, (long long)out, flop / f,
               flop / b, flop / d);
    }
    return 0;
}

int gradcheck_command(int argc, char** argv) {
    double tolerance = 1e-6;
    Options o("ref_cpu", "ref_cpu gradcheck\n\nCompares every gradient with central differences in double.");
    o.add("tolerance", &tolerance, "largest relative error (L2 per tensor) that passes", 0);
    if (!o.parse(argc, argv, 1)) return 0;
    int bad = 0;
    printf("%-20s %-48s %s\n", "op", "tensor", "relative error");
    for (const GradientError& e : gradient_check()) {
        const bool ok = e.relative <= tolerance;  // false for NaN
        bad += !ok;
        printf("%-20s %-48s %.1e%s\n", e.op.c_str(), e.tensor.c_str(), e.relative, ok ? "" : "  WRONG");
    }
    printf("%s\n", bad ? "some gradients are wrong" : "all gradients agree");
    return bad ? 1 : 0;
}

}  // namespace
#endif

// clang-format off
// float trains, double is the truth: everything is compiled for both here, once.
#define INSTANTIATE(T) \
    template void matmul<T>(T*, int64, const T*, int64, Layout, const T*, int64, Layout, int64, int64, int64, bool); \
    template void linear_forward<T>(T*, const T*, const T*, int64, int64, int64); \
    template void linear_backward<T>(T*, T*, const T*, const T*, const T*, int64, int64, int64, bool); \
    template void embedding_forward<T>(T*, const int32_t*, const T*, int64, int64); \
    template void embedding_backward<T>(T*, const T*, const int32_t*, int64, int64); \
    template void rmsnorm_forward<T>(T*, T*, const T*, const T*, double, int64, int64); \
    template void rmsnorm_backward<T>(T*, T*, const T*, const T*, const T*, const T*, int64, int64); \
    template void rope<T>(T*, const RopeTable<T>&, int64, int64, int64, int64, int64, bool); \
    template void attention_forward<T>(T*, T*, const T*, const T*, const T*, const AttentionShape&); \
    template void attention_backward<T>(T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const AttentionShape&); \
    template void ssd_dt_forward<T>(T*, T*, const T*, const T*, const T*, bool, int64, int64, int64); \
    template void ssd_dt_backward<T>(T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, bool, int64, int64, int64); \
    template void ssd_recurrent_forward<T>(T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const SsdShape&); \
    template void ssd_quadratic_forward<T>(T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const SsdShape&); \
    template void ssd_chunked_forward<T>(T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const SsdShape&); \
    template void ssd_recurrent_backward<T>(T*, T*, T*, T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*, const SsdShape&); \
    template void ssd_quadratic_backward<T>(T*, T*, T*, T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*, const SsdShape&); \
    template void ssd_chunked_backward<T>(T*, T*, T*, T*, T*, T*, T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*, const T*, const SsdShape&); \
    template void residual_forward<T>(T*, const T*, const T*, const T*, const Dropout&, int64, int64); \
    template void residual_backward<T>(T*, T*, T*, const T*, const T*, const T*, const Dropout&, int64, int64); \
    template void swiglu_forward<T>(T*, const T*, int64, int64); \
    template void swiglu_backward<T>(T*, const T*, const T*, int64, int64); \
    template void cross_entropy_forward<T>(T*, const T*, const int32_t*, int64, int64); \
    template void cross_entropy_backward<T>(T*, const T*, const int32_t*, double, int64, int64); \
    template void adamw_update<T>(T*, T*, T*, const T*, const AdamW&, bool, double, int64, double, int64); \
    template class Model<T>; \
    template struct ModelState<T>; \
    template struct RopeTable<T>;
// clang-format on
INSTANTIATE(float)
INSTANTIATE(double)
#undef INSTANTIATE

}  // namespace ref

std::unique_ptr<Engine> make_cpu_engine(const Config& c) { return std::make_unique<ref::CpuEngine>(c); }

// ---------------------------------------------------------------------------------------------------------------------
// 16  Host side, what every engine shares: configuration
// ---------------------------------------------------------------------------------------------------------------------

namespace {

std::string prefix(const std::string& where) { return where.empty() ? "" : where + ": "; }

// The number of parameters as a double, so that sizes whose product no integer holds can be refused.
double parameter_estimate(const Config& c) {
    const double D = double(c.D), N = double(c.N), H = double(c.H), F = double(c.F);
    const double mixer = std::max(2 * H * N * D + 2 * D * D + H * D, 4 * D * D);
    return double(c.V) * D * (c.tie ? 1 : 2) + double(c.L) * (mixer + 3 * F * D + 4 * D);
}

}  // namespace

void Config::validate(const std::string& where) const {
    const std::string at = prefix(where);
    const auto size = [&](const char* field, int64 v, int64 low) {
        if (v < low || v > INT32_MAX)
            fail("%s%s is %lld, expected %lld..%d", at.c_str(), field, (long long)v, (long long)low, INT32_MAX);
    };
    const auto divisible = [&](const char* a, int64 x, const char* b, int64 y) {
        if (x % y != 0) fail("%s%s %lld is not divisible by %s %lld", at.c_str(), a, (long long)x, b, (long long)y);
    };
    size("vocab_size", V, 1);
    size("hidden_size", D, 1);
    size("num_hidden_layers", L, 1);
    size("num_attention_heads", H, 1);
    size("num_key_value_heads", Hkv, 1);
    size("ssd_state_size", N, 1);
    size("intermediate_size", F, 1);
    size("max_position_embeddings", T, 1);
    size("ssd_chunk_size", Q, 1);
    size("attn_layer_period", attn_period, 0);
    size("attn_layer_offset", attn_offset,
         0);  // at or beyond the period: no attention layer, which describe() points out
    divisible("hidden_size", D, "num_attention_heads", H);
    divisible("num_attention_heads", H, "num_key_value_heads", Hkv);
    if (P() % 2 != 0)
        fail(
            "%shidden_size %lld / num_attention_heads %lld gives heads of %lld, expected an even number (RoPE turns "
            "pairs)",
            at.c_str(), (long long)D, (long long)H, (long long)P());
    if (N % 2 != 0)
        fail("%sssd_state_size is %lld, expected an even number (RoPE turns pairs)", at.c_str(), (long long)N);
    // Written so that NaN is refused too.
    if (!(rope_theta > 0 && std::isfinite(rope_theta)))
        fail("%srope_theta is %g, expected a number above 0", at.c_str(), rope_theta);
    if (!(norm_eps > 0 && norm_eps < 1)) fail("%srms_norm_eps is %g, expected a number in (0,1)", at.c_str(), norm_eps);
    if (!(dropout >= 0 && dropout < 1)) fail("%shidden_dropout is %g, expected a number in [0,1)", at.c_str(), dropout);
    if (!(parameter_estimate(*this) < 1e14))
        fail(
            "%svocab_size %lld, hidden_size %lld, num_hidden_layers %lld, ssd_state_size %lld and intermediate_size "
            "%lld make "
            "%.1e parameters, more than any machine holds",
            at.c_str(), (long long)V, (long long)D, (long long)L, (long long)N, (long long)F,
            parameter_estimate(*this));
}

Json Config::to_json() const {
    Json architectures = Json::array(), j = Json::object();
    architectures.items.emplace_back("TransXSSMForCausalLM");
    j.keys = {
        {"architectures", architectures},
        {"model_type", "TransXSSM"},
        {"vocab_size", V},
        {"hidden_size", D},
        {"num_hidden_layers", L},
        {"num_attention_heads", H},
        {"num_key_value_heads", Hkv},
        {"ssd_state_size", N},
        {"ssd_chunk_size", Q},
        {"ssd_decay", ssd_decay},
        {"intermediate_size", F},
        {"max_position_embeddings", T},
        {"attn_layer_period", attn_period},
        {"attn_layer_offset", attn_offset},
        {"rope_theta", rope_theta},
        {"rope_scaling", Json()},
        {"rms_norm_eps", norm_eps},
        {"hidden_act", "silu"},
        {"hidden_bias", false},
        {"hidden_dropout", dropout},
        {"attention_dropout", 0.0},
        {"dynamic_mask_ratio", 0.0},
        {"initializer_range", 0.02},
        {"tie_word_embeddings", tie},
        {"bos_token_id", Json()},
        {"eos_token_id", Json()},
        {"pad_token_id", Json()},  // the published default would blank token 2
        {"use_cache", true},
        {"torch_dtype", "float32"},
    };
    return j;
}

namespace {

// Reads the keys of a config.json. An absent key keeps the given default; a key of the wrong type is refused by name.
class ConfigReader {
  public:
    ConfigReader(const Json& config_json, const std::string& place) : json(config_json), where(place) {
        if (json.type != Json::Object) fail("%sexpected a JSON object", prefix(where).c_str());
    }
    void required(const char* key, int64* v) const {
        if (!json.find(key)) fail("%s%s is missing", prefix(where).c_str(), key);
        read(key, v);
    }
    bool has(const char* key) const {  // and it is not null
        const Json* j = json.find(key);
        return j && j->type != Json::Null;
    }
    void read(const char* key, int64* v) const {
        const Json* j = json.find(key);
        if (j && !j->integer(v)) wrong(key, *j, "an integer");
    }
    void read(const char* key, double* v) const {
        const Json* j = json.find(key);
        if (!j) return;
        if (j->type != Json::Number) wrong(key, *j, "a number");
        *v = j->number;
    }
    void read(const char* key, bool* v) const {
        const Json* j = json.find(key);
        if (!j) return;
        if (j->type != Json::Bool) wrong(key, *j, "true or false");
        *v = j->boolean;
    }
    void read(const char* key, std::string* v) const {
        const Json* j = json.find(key);
        if (!j) return;
        if (j->type != Json::String) wrong(key, *j, "a text");
        *v = j->text;
    }
    // What would change the result and is not computed here.
    void refuse_unless_zero(const char* key) const {
        double v = 0;
        read(key, &v);
        if (v != 0)
            fail("%s%s is %s, but this program has no such thing: only 0 is supported", prefix(where).c_str(), key,
                 to_text(v).c_str());
    }
    // Dynamic NTK scaling changes nothing up to the original length, and only that far is it a function of the position
    // alone: the published code lets the result depend on the lengths of earlier calls.
    void check_rope_scaling(int64 T) const {
        if (!has("rope_scaling")) return;
        const Json& j = *json.find("rope_scaling");
        if (j.type != Json::Object) wrong("rope_scaling", j, "null or an object");
        const Json* type = j.find("rope_type") ? j.find("rope_type") : j.find("type");
        if (!type || type->type != Json::String)
            fail("%srope_scaling.rope_type is missing or not a text", prefix(where).c_str());
        if (type->text == "default") return;
        if (type->text != "dynamic")
            fail("%srope_scaling.rope_type is %s, supported are null, \"default\" and \"dynamic\"",
                 prefix(where).c_str(), Json::quote(type->text).c_str());
        int64 original = T;
        const Json* o = j.find("original_max_position_embeddings");
        if (o && !o->integer(&original)) wrong("rope_scaling.original_max_position_embeddings", *o, "an integer");
        if (T > original)
            fail(
                "%srope_scaling is dynamic and max_position_embeddings %lld is beyond original_max_position_embeddings "
                "%lld: "
                "there its result depends on earlier calls, which is not supported",
                prefix(where).c_str(), (long long)T, (long long)original);
    }

  private:
    const Json& json;
    const std::string& where;
    [[noreturn]] void wrong(const char* key, const Json& found, const char* expected) const {
        const bool scalar = found.type != Json::Array && found.type != Json::Object;
        fail("%s%s is %s, expected %s", prefix(where).c_str(), key,
             scalar ? found.dump(0).c_str() : "a list or an object", expected);
    }
};

}  // namespace

Config Config::from_json(const Json& j, const std::string& where) {
    const ConfigReader in(j, where);
    std::string type = "TransXSSM", act = "silu";
    in.read("model_type", &type);
    if (type != "TransXSSM")
        fail("%smodel_type is %s, expected \"TransXSSM\"", prefix(where).c_str(), Json::quote(type).c_str());
    Config c;
    c.T = 2048;  // what is absent has the published code's default
    c.Q = 256;
    in.required("vocab_size", &c.V);
    in.required("hidden_size", &c.D);
    in.required("num_hidden_layers", &c.L);
    in.required("num_attention_heads", &c.H);
    in.required("intermediate_size", &c.F);
    c.Hkv = c.H;
    if (in.has("num_key_value_heads")) in.read("num_key_value_heads", &c.Hkv);
    c.N = c.H > 0 ? c.P() : 0;  // the published code has no state size of its own
    if (in.has("ssd_state_size")) in.read("ssd_state_size", &c.N);
    in.read("max_position_embeddings", &c.T);
    in.read("ssd_chunk_size", &c.Q);
    in.read("ssd_decay", &c.ssd_decay);
    in.read("attn_layer_period", &c.attn_period);
    in.read("attn_layer_offset", &c.attn_offset);
    in.read("rope_theta", &c.rope_theta);
    in.read("rms_norm_eps", &c.norm_eps);
    in.read("hidden_dropout", &c.dropout);
    in.read("tie_word_embeddings", &c.tie);

    bool bias = false;  // the published code's biases: load_weights asks that all but that of dt_proj are zero
    in.read("hidden_bias", &bias);
    in.read("hidden_act", &act);
    if (act != "silu" && act != "swish")
        fail("%shidden_act is %s, supported is \"silu\"", prefix(where).c_str(), Json::quote(act).c_str());
    in.refuse_unless_zero("attention_dropout");
    in.refuse_unless_zero("dynamic_mask_ratio");
    in.check_rope_scaling(c.T);
    c.validate(where);
    return c;
}

namespace {

struct Preset {
    const char* name;
    int64 V, D, L, H, N, F, T, Q, attn_period, attn_offset;
    bool tie;
};
// clang-format off
const Preset presets[] = {
    //         V     D   L   H    N     F     T    Q  period, offset
    {"tiny",   256,  128,  4,  4,  32,  320,  256,  64, 4, 3, true},
    {"5m",     256,  256,  8,  4,  64,  512,  256,  64, 8, 7, true},
    {"10m",    256,  384,  8,  6,  64,  624,  256,  64, 8, 7, true},
    {"320m", 50304,  768, 24, 12, 128, 3072, 4096, 256, 8, 7, false},
    {"1.3b", 50304, 2048, 24, 32, 128, 4096, 4096, 256, 8, 7, true},
};
// clang-format on

}  // namespace

std::vector<std::string> preset_names() {
    std::vector<std::string> names;
    for (const Preset& p : presets) names.push_back(p.name);
    return names;
}

Config preset(const std::string& name) {
    std::string all;
    for (const Preset& p : presets) {
        all += std::string(all.empty() ? "" : ", ") + p.name;
        if (name != p.name) continue;
        Config c;
        c.V = p.V;
        c.D = p.D;
        c.L = p.L;
        c.H = c.Hkv = p.H;
        c.N = p.N;
        c.F = p.F;
        c.T = p.T;
        c.Q = p.Q;
        c.attn_period = p.attn_period;
        c.attn_offset = p.attn_offset;
        c.tie = p.tie;
        return c;
    }
    usage_error("unknown preset '%s'; did you mean '%s'? (%s)", name.c_str(),
                nearest_word(name, preset_names()).c_str(), all.c_str());
}

void add_model_options(Options* o, Config* c) {
    const int64 big = int64(1) << 40;
    o->add("layers", &c->L, "layers", 1, 65535);
    o->add("d-model", &c->D, "width", 1, big);
    o->add("heads", &c->H, "heads", 1, big);
    o->add("kv-heads", &c->Hkv, "key/value heads of an attention layer; as many as --heads if only that is given", 1,
           big);
    o->add("d-state", &c->N, "state size of an SSD head", 1, big);
    o->add("d-ff", &c->F, "feed-forward width", 1, big);
    o->add("attn-period", &c->attn_period, "one layer in so many is attention; 0: none, 1: all", 0, 65535);
    o->add("attn-offset", &c->attn_offset, "which one: layer % period == offset", 0, 65535);
    o->add("chunk", &c->Q, "chunk length of SSD", 1, big);
    o->add("rope-theta", &c->rope_theta, "base of the rotary positions", 1e-6, 1e18);
    o->add("tie", &c->tie, "the output head is the embedding");
    o->add("ssd-decay", &c->ssd_decay, "false: states do not decay (the paper's equation 7)");
}

// ---------------------------------------------------------------------------------------------------------------------
// The parameter table and the initial weights
// ---------------------------------------------------------------------------------------------------------------------

ParamTable::ParamTable(const Config& c) {
    c.validate();
    index.assign(size_t((c.L + 1) * kParams), -1);
    const auto add = [&](Param param, int64 layer, const std::string& name, const Shape& shape, Init init) {
        const int64 n = element_count(shape);
        index[size_t((layer + 1) * kParams + int64(param))] = count;
        specs.push_back({name, param, layer, shape, init, shape.size() == 2, count, n});
        count += n;
    };
    const int64 D = c.D, H = c.H, N = c.N, F = c.F, kv = c.Hkv * c.P();
    add(Param::word_embed, -1, "model.word_embed.weight", {c.V, D}, Init::normal);
    for (int64 i = 0; i < c.L; ++i) {
        const std::string layer = "model.layers." + std::to_string(i);
        add(Param::norm1, i, layer + ".pre_sequence_layernorm.weight", {D}, Init::ones);
        if (c.is_attention(i)) {
            add(Param::q_proj, i, layer + ".attn.q_proj.weight", {D, D}, Init::normal);
            add(Param::k_proj, i, layer + ".attn.k_proj.weight", {kv, D}, Init::normal);
            add(Param::v_proj, i, layer + ".attn.v_proj.weight", {kv, D}, Init::normal);
            add(Param::o_proj, i, layer + ".attn.o_proj.weight", {D, D}, Init::normal);
        } else {
            add(Param::c_proj, i, layer + ".ssd.c_proj.weight", {H * N, D}, Init::normal);
            add(Param::b_proj, i, layer + ".ssd.b_proj.weight", {H * N, D}, Init::normal);
            add(Param::x_proj, i, layer + ".ssd.x_proj.weight", {D, D}, Init::normal);
            add(Param::dt_proj, i, layer + ".ssd.dt_proj.weight", {H, D}, Init::normal);
            add(Param::dt_bias, i, layer + ".ssd.dt_bias", {H}, Init::dt_bias);
            add(Param::A_log, i, layer + ".ssd.A_log", {H}, Init::a_log);
            add(Param::out_proj, i, layer + ".ssd.out_proj.weight", {D, D}, Init::normal);
        }
        add(Param::res1, i, layer + ".post_sequence_residual.weight", {D}, Init::ones);
        add(Param::norm2, i, layer + ".pre_state_layernorm.weight", {D}, Init::ones);
        add(Param::gate_proj, i, layer + ".feed_forward.gate_proj.weight", {F, D}, Init::normal);
        add(Param::up_proj, i, layer + ".feed_forward.up_proj.weight", {F, D}, Init::normal);
        add(Param::down_proj, i, layer + ".feed_forward.down_proj.weight", {D, F}, Init::normal);
        add(Param::res2, i, layer + ".post_state_residual.weight", {D}, Init::ones);
    }
    add(Param::final_norm, -1, "model.final_layernorm.weight", {D}, Init::ones);
    if (!c.tie) add(Param::lm_head, -1, "lm_head.weight", {c.V, D}, Init::normal);
}

int64 ParamTable::offset(Param p, int64 layer) const {
    const size_t i = size_t((layer + 1) * kParams + int64(p));
    if (i >= index.size() || index[i] < 0)
        fail("parameter %d of layer %lld is not part of this model", int(p), (long long)layer);
    return index[i];
}

const ParamSpec* ParamTable::find(const std::string& name) const {
    for (const ParamSpec& s : specs)
        if (s.name == name) return &s;
    return nullptr;
}

const ParamSpec& ParamTable::at(int64 element) const {
    if (element < 0 || element >= count)
        fail("element %lld is outside the %lld parameters", (long long)element, (long long)count);
    const auto after =
        std::upper_bound(specs.begin(), specs.end(), element, [](int64 e, const ParamSpec& s) { return e < s.offset; });
    return *(after - 1);
}

namespace {

// Element i of a tensor is a function of the seed, the tensor's name and i alone: any number of threads makes the same.
float initial_value(Init init, const Philox& stream, uint64_t i) {
    switch (init) {
        case Init::normal: return float(0.02 * stream.normal_at(i));
        case Init::a_log: return float(std::log(1 + 15 * stream.uniform_at(i)));
        case Init::dt_bias: {
            const double low = std::log(1e-3), high = std::log(1e-1);
            const double dt = std::exp(low + (high - low) * stream.uniform_at(i));
            return float(dt + std::log(-std::expm1(-dt)));  // softplus of this is dt
        }
        case Init::ones: break;
    }
    return 1;
}

}  // namespace

std::vector<float> initial_weights(const Config& config, uint64_t seed) {
    const ParamTable table(config);
    std::vector<float> w(size_t(table.count));
    for (const ParamSpec& s : table.specs) {
        const Philox stream(seed, s.name.c_str());
        float* const to = w.data() + s.offset;
        const int64 n = s.count;
        const Init init = s.init;
#pragma omp parallel for schedule(static) if (n > 4096)
        for (int64 i = 0; i < n; ++i) to[i] = initial_value(init, stream, uint64_t(i));
    }
    return w;
}

// ---------------------------------------------------------------------------------------------------------------------
// Model directories
// ---------------------------------------------------------------------------------------------------------------------

// The step-N directory with the greatest N, "" if there is none.
static std::string newest_step(const std::string& dir) {
    std::string best;
    int64 best_step = -1, step = 0;
    if (DIR* d = opendir(dir.c_str())) {
        while (const dirent* e = readdir(d)) {
            const std::string name = e->d_name;
            if (name.compare(0, 5, "step-") != 0 || !parse_int(name.substr(5), &step) || step <= best_step) continue;
            best = name;
            best_step = step;
        }
        closedir(d);
    }
    return best;
}

std::string strip_slashes(std::string path) {
    while (path.size() > 1 && path.back() == '/') path.pop_back();
    return path;
}

std::string read_name(const std::string& file) {
    std::string name = file_exists(file) ? read_file(file) : "";
    while (!name.empty() && isspace(uint8_t(name.back()))) name.pop_back();
    return name;
}

std::string resolve_checkpoint(const std::string& given) {
    const std::string dir = strip_slashes(given);
    if (!file_exists(dir)) fail("%s: no such directory", dir.c_str());
    if (!is_directory(dir)) fail("%s: is a file, expected a checkpoint directory", dir.c_str());
    const std::string latest = dir + "/latest";
    if (!file_exists(latest)) {
        if (!file_exists(dir + "/config.json")) {
            const std::string step =
                newest_step(dir);  // a run that was killed before it had named its first checkpoint
            fail("%s: not a checkpoint: neither config.json nor latest is in it%s", dir.c_str(),
                 step.empty() ? "" : ("; give " + dir + "/" + step).c_str());
        }
        return dir;
    }
    const std::string name = read_name(latest);
    if (name.empty() || name == "." || name == ".." || name.find_first_of(std::string("/\n\0", 3)) != std::string::npos)
        fail("%s: expected one line, the name of a directory beside it", latest.c_str());
    if (!is_directory(dir + "/" + name))
        fail("%s: names '%s', which is not a directory beside it", latest.c_str(), name.c_str());
    return dir + "/" + name;
}

Config load_config(const std::string& dir) {
    const std::string file = dir + "/config.json";
    return Config::from_json(Json::parse(read_file(file), file), file);
}

namespace {

// The name of a parameter in files of the published code: A is there in place of A_log, and dt's bias is its projection's.
std::string published_name(const ParamSpec& s) {
    const std::string ssd = s.name.substr(0, s.name.rfind('.'));
    return s.param == Param::A_log ? ssd + ".A" : s.param == Param::dt_bias ? ssd + ".dt_proj.bias" : s.name;
}

// Where hidden_bias is true, each weight of a layer has a bias (out) there, which has no counterpart here: it must be
// zero. "" if this parameter has none. That of dt_proj is dt_bias, a parameter of its own.
std::string published_bias(const ParamSpec& s) {
    const bool has = s.layer >= 0 && s.shape.size() == 2 && s.param != Param::dt_proj;
    return has ? s.name.substr(0, s.name.rfind('.')) + ".bias" : "";
}

// DIR/model.safetensors. Other forms in which Hugging Face's tools write weights are told by their names.
std::string weight_file(const std::string& dir) {
    const std::string file = dir + "/model.safetensors";
    if (file_exists(file)) return file;
    for (const char* name : {"/pytorch_model.bin", "/pytorch_model.bin.index.json"})
        if (file_exists(dir + name))
            fail(
                "%s%s: weights as a Python pickle are not read; convert them to model.safetensors (save_pretrained with "
                "safe_serialization=True)",
                dir.c_str(), name);
    if (file_exists(file + ".index.json"))
        fail(
            "%s.index.json: weights in several files are not read; join them in one model.safetensors "
            "(save_pretrained with a greater max_shard_size)",
            file.c_str());
    return file;  // opening it says what is wrong
}

// model.safetensors against the parameter table: every tensor is asked for once, and none may be left over.
class WeightFile {
  public:
    WeightFile(const std::string& dir, const Config& c) : config(c), file(weight_file(dir)) {}

    std::vector<float> load() {
        // Sizes are compared before memory is asked for: config.json may hold anything.
        if (config.L > int64(file.entries.size()))
            fail("%s: %zu tensors cannot be the num_hidden_layers %lld of config.json", path(), file.entries.size(),
                 (long long)config.L);
        const ParamTable table(config);
        for (const ParamSpec& s : table.specs)
            if (const SafeTensors::Entry* e = file.find(s.name)) check_shape(*e, s.shape);
        std::vector<float> w(size_t(table.count));
        for (const ParamSpec& s : table.specs) {
            float* const to = w.data() + s.offset;
            if (const SafeTensors::Entry* e = take(s.name)) {
                file.read(*e, to);
            } else if (!read_published_form(s, to)) {
                const std::string kind = s.layer < 0 ? "" : config.is_attention(s.layer) ? "an attention" : "an SSD";
                fail("%s: tensor '%s' %s is missing%s", path(), s.name.c_str(), to_text(s.shape).c_str(),
                     kind.empty() ? "" : (": config.json makes this " + kind + " layer").c_str());
            }
        }
        if (config.tie) check_tied_head(w.data() + table.offset(Param::word_embed));
        for (const ParamSpec& s : table.specs) check_published_bias(s);
        for (const SafeTensors::Entry& e : file.entries)
            if (!taken.count(e.name))
                fail("%s: tensor '%s' %s is not part of the model that config.json describes", path(), e.name.c_str(),
                     to_text(e.shape).c_str());
        return w;
    }

  private:
    const Config& config;
    const SafeTensors file;
    std::set<std::string> taken;

    const char* path() const { return file.path.c_str(); }
    const SafeTensors::Entry* take(const std::string& name) {
        const SafeTensors::Entry* e = file.find(name);
        if (e) taken.insert(name);
        return e;
    }
    void check_shape(const SafeTensors::Entry& e, const Shape& expected) const {
        if (e.shape != expected)
            fail("%s: tensor '%s' has shape %s, config.json asks for %s", path(), e.name.c_str(),
                 to_text(e.shape).c_str(), to_text(expected).c_str());
    }
    // The published code has A where we have A_log, and no dt_bias but the bias of dt_proj, or none, which means 0.
    bool read_published_form(const ParamSpec& s, float* to) {
        if (s.param != Param::dt_bias && s.param != Param::A_log) return false;
        const SafeTensors::Entry* e = take(published_name(s));
        if (!e) return s.param == Param::dt_bias;
        check_shape(*e, s.shape);
        if (s.param == Param::dt_bias) {
            file.read(*e, to);
            return true;
        }
        std::vector<double> A(size_t(s.count));
        file.read(*e, A.data());
        for (size_t h = 0; h < A.size(); ++h) {
            if (!(A[h] < 0))
                fail(
                    "%s: tensor '%s': element %zu is %g, expected a number below 0: the state decays by exp(A dt) per "
                    "token, so "
                    "that with A >= 0 it would never fade, or grow without bound",
                    path(), e->name.c_str(), h, A[h]);
            to[h] = float(std::log(-A[h]));
        }
        return true;
    }
    void check_published_bias(const ParamSpec& s) {
        const SafeTensors::Entry* e = take(published_bias(s));
        if (!e) return;
        check_shape(*e, {s.shape[0]});
        std::vector<float> bias(size_t(s.shape[0]));
        file.read(*e, bias.data());
        for (size_t i = 0; i < bias.size(); ++i)
            if (bias[i] != 0)
                fail("%s: tensor '%s': element %zu is %g, expected 0: this program has no bias other than dt_bias",
                     path(), e->name.c_str(), i, double(bias[i]));
    }
    // Some writers store a tied head as well.
    void check_tied_head(const float* embed) {
        const SafeTensors::Entry* e = take("lm_head.weight");
        if (!e) return;
        check_shape(*e, {config.V, config.D});
        std::vector<float> head(size_t(config.V * config.D));
        file.read(*e, head.data());
        for (size_t i = 0; i < head.size(); ++i)
            if (head[i] != embed[i])
                fail(
                    "%s: tensor 'lm_head.weight' differs from model.word_embed.weight at element %zu (%g, %g), but "
                    "config.json has tie_word_embeddings true",
                    path(), i, double(head[i]), double(embed[i]));
    }
};

}  // namespace

std::vector<float> load_weights(const std::string& dir, const Config& config) { return WeightFile(dir, config).load(); }

static void write_model(const std::string& dir, const Json& config, const std::vector<TensorView>& tensors,
                        const Tokenizer& tokenizer) {
    write_safetensors(dir + "/model.safetensors", tensors,
                      {{"format", "pt"}});  // Hugging Face's readers ask for the format
    write_file(dir + "/config.json", config.dump() + "\n");
    write_file(dir + "/tokenizer.json", tokenizer.json());
    sync_directory(dir);
}

void save_model(const std::string& dir, const Config& config, const float* weights, const Tokenizer& tokenizer) {
    const ParamTable table(config);
    std::vector<TensorView> tensors;
    for (const ParamSpec& s : table.specs) tensors.push_back({s.name, DType::F32, s.shape, weights + s.offset});
    write_model(dir, config.to_json(), tensors, tokenizer);
}

// ---------------------------------------------------------------------------------------------------------------------
// Exchange with the published PyTorch module
// ---------------------------------------------------------------------------------------------------------------------
// Its files have our names but for A and the bias of dt (published_name), and load_weights reads both. What it has no
// place for is refused (docs/format.md).

namespace {

bool has_ssd_layer(const Config& c) {
    for (int64 i = 0; i < c.L; ++i)
        if (!c.is_attention(i)) return true;
    return false;
}

Json published_config(const Config& c, const std::string& file) {
    Json j = c.to_json();
    if (has_ssd_layer(c)) {
        if (c.N != c.P())
            fail(
                "%s: ssd_state_size is %lld, but the published module has no state size other than hidden_size / "
                "num_attention_heads, here %lld",
                file.c_str(), (long long)c.N, (long long)c.P());
        if (!c.ssd_decay)
            fail("%s: ssd_decay is false, but the published module has no such setting: its state always decays",
                 file.c_str());
        j.set("hidden_bias", true);  // dt_bias needs it
    }
    if (c.attn_period == 0) {  // i % 0 is an error there; no layer i < L has i % (L+1) = L
        j.set("attn_layer_period", c.L + 1);
        j.set("attn_layer_offset", c.L);
    }
    return j;
}

// A = -exp(A_log), which load_weights turns back.
std::vector<float> published_A(const float* A_log, const ParamSpec& s, const std::string& file) {
    std::vector<float> A(size_t(s.count));
    for (size_t h = 0; h < A.size(); ++h) {
        A[h] = float(-std::exp(double(A_log[h])));
        if (!(A[h] <= -std::numeric_limits<float>::min() && std::isfinite(A[h])))
            fail("%s: tensor '%s': element %zu is %g, and -exp of it is out of the range of float32", file.c_str(),
                 s.name.c_str(), h, double(A_log[h]));
    }
    return A;
}

// A name for a directory that is not there yet.
std::string new_directory(const std::string& given) {
    const std::string out = strip_slashes(given);
    struct stat st;
    if (out.empty()) fail("OUT is empty, expected the name of a directory to make");
    if (lstat(out.c_str(), &st) == 0) fail("%s: exists already; choose another name", out.c_str());
    return out;
}

// Writes a model into OUT.tmp and renames that to OUT, so that OUT is whole whenever it is there.
void write_new_directory(const std::string& out, const std::function<void(const std::string& tmp)>& write) {
    const std::string tmp = out + ".tmp";
    if (mkdir(tmp.c_str(), 0777) != 0)
        fail("%s: cannot create directory: %s%s", tmp.c_str(), strerror(errno),
             errno == EEXIST ? "; if a program that was killed has left it, remove it" : "");
    const auto remove = [&] {
        for (const char* name : {"/model.safetensors", "/config.json", "/tokenizer.json"}) unlink((tmp + name).c_str());
        rmdir(tmp.c_str());
    };
    try {
        write(tmp);
    } catch (...) {
        remove();
        throw;
    }
    if (rename(tmp.c_str(), out.c_str()) != 0) {
        const int e = errno;
        remove();
        fail("%s: cannot rename from %s: %s", out.c_str(), tmp.c_str(), strerror(e));
    }
    sync_directory(parent_directory(out));
}

}  // namespace

void export_model(const std::string& given, const std::string& given_out) {
    const std::string out = new_directory(given_out), dir = resolve_checkpoint(given);
    const Config c = load_config(dir);
    const Json config = published_config(c, dir + "/config.json");
    const std::unique_ptr<Tokenizer> tokenizer = load_tokenizer(dir + "/tokenizer.json");
    const std::vector<float> weights = load_weights(dir, c);
    const ParamTable table(c);
    const bool biases = has_ssd_layer(c);
    std::vector<TensorView> tensors;
    std::vector<std::vector<float>> made;  // tensors that are not among our weights as they are
    for (const ParamSpec& s : table.specs) {
        const float* data = weights.data() + s.offset;
        if (s.param == Param::A_log) {
            made.push_back(published_A(data, s, dir + "/model.safetensors"));
            data = made.back().data();
        }
        tensors.push_back({published_name(s), DType::F32, s.shape, data});
        if (biases && !published_bias(s).empty()) {
            made.emplace_back(size_t(s.shape[0]), 0.0f);
            tensors.push_back({published_bias(s), DType::F32, {s.shape[0]}, made.back().data()});
        }
    }
    write_new_directory(out, [&](const std::string& tmp) { write_model(tmp, config, tensors, *tokenizer); });
}

void import_model(const std::string& given, const std::string& given_out) {
    const std::string out = new_directory(given_out), dir = resolve_checkpoint(given), file = dir + "/tokenizer.json";
    Config c = load_config(dir);
    const bool bytes = !file_exists(file);  // the published code says nothing of tokenizers
    if (bytes && c.V != 256)
        fail("%s: is missing; only vocab_size 256 can be taken as bytes, config.json has %lld", file.c_str(),
             (long long)c.V);
    const std::unique_ptr<Tokenizer> tokenizer = bytes ? make_byte_tokenizer() : load_tokenizer(file);
    if (tokenizer->vocab_size() > c.V)
        fail("%s: %lld tokens, but the model's vocabulary is %lld", file.c_str(), (long long)tokenizer->vocab_size(),
             (long long)c.V);
    const std::vector<float> weights = load_weights(dir, c);
    if (c.attn_period == c.L + 1 && c.attn_offset == c.L) c.attn_period = c.attn_offset = 0;  // as export wrote it
    write_new_directory(out, [&](const std::string& tmp) { save_model(tmp, c, weights.data(), *tokenizer); });
}

// ---------------------------------------------------------------------------------------------------------------------
// Sampling
// ---------------------------------------------------------------------------------------------------------------------

void Sampler::add_options(Options* options) {
    options->add("temperature", &temperature, "divides the logits; 0 takes the most probable token", 0, 1e6);
    options->add("top-k", &top_k, "keep the k most probable tokens; 0 keeps all", 0);
    options->add("top-p", &top_p, "then the fewest most probable tokens that reach this probability", 0, 1);
    options->add("min-p", &min_p, "then those with this share of the greatest probability", 0, 1);
    options->add("seed", &seed, "of the random draws");
}

int32_t Sampler::choose(const float* logits, int64 vocab, uint64_t draw) const {
    if (!(temperature >= 0 && std::isfinite(temperature))) fail("temperature is %g, expected 0 or more", temperature);
    if (top_k < 0) fail("top-k is %lld, expected 0 or more", (long long)top_k);
    if (!(top_p >= 0 && top_p <= 1)) fail("top-p is %g, expected 0..1", top_p);
    if (!(min_p >= 0 && min_p <= 1)) fail("min-p is %g, expected 0..1", min_p);
    if (vocab < 1 || vocab > INT32_MAX) fail("cannot choose among %lld tokens", (long long)vocab);

    int32_t best = 0;
    for (int64 i = 0; i < vocab; ++i) {
        if (std::isnan(logits[i]) || logits[i] == HUGE_VALF)
            fail("the logit of token %lld is %g, expected a finite number", (long long)i, double(logits[i]));
        if (logits[i] > logits[best]) best = int32_t(i);
    }
    if (logits[best] == -HUGE_VALF) fail("the logits of all %lld tokens are -inf", (long long)vocab);
    if (temperature == 0) return best;

    // Probabilities up to a common factor; the greatest is 1, so that nothing overflows and the sum is never 0. The
    // order of tokens is that of their logits, lower ids first among equals: probabilities may be equal by underflow
    // alone.
    std::vector<double> p(size_t(vocab), 0.0);
    for (int64 i = 0; i < vocab; ++i) p[size_t(i)] = std::exp((double(logits[i]) - double(logits[best])) / temperature);
    const auto before = [&](int32_t a, int32_t b) { return logits[a] != logits[b] ? logits[a] > logits[b] : a < b; };
    const auto after = [&](int32_t a, int32_t b) { return before(b, a); };

    std::vector<int32_t> kept(static_cast<size_t>(vocab));
    for (size_t i = 0; i < kept.size(); ++i) kept[i] = int32_t(i);
    if (top_k > 0 && top_k < vocab) {
        std::nth_element(kept.begin(), kept.begin() + (top_k - 1), kept.end(), before);
        kept.resize(size_t(top_k));
    }
    if (top_p < 1) {  // off the top of a heap until they reach top_p: usually few of a large vocabulary
        std::sort(kept.begin(), kept.end());
        double total = 0, reached = 0;
        for (const int32_t i : kept) total += p[size_t(i)];
        std::make_heap(kept.begin(), kept.end(), after);
        auto rest = kept.end();
        do {
            std::pop_heap(kept.begin(), rest, after);
            --rest;
            reached += p[size_t(*rest)];
        } while (rest != kept.begin() && reached < top_p * total);
        kept.erase(kept.begin(), rest);
    }
    if (min_p > 0)
        kept.erase(std::remove_if(kept.begin(), kept.end(), [&](int32_t i) { return p[size_t(i)] < min_p; }),
                   kept.end());

    std::sort(kept.begin(), kept.end());  // by id, so that a draw means the same however the set was found
    double total = 0;
    for (const int32_t i : kept) total += p[size_t(i)];
    const double target = Philox(seed, "sample").uniform_at(draw) * total;
    double reached = 0;
    for (const int32_t i : kept) {
        reached += p[size_t(i)];
        if (target < reached) return i;
    }
    return best;  // rounding left the target at the very end
}

namespace {

void check_token(const char* where, int32_t id, const Config& config) {
    if (id < 0 || id >= config.V)
        fail("%s: token id %d is outside the model's vocabulary of %lld", where, id, (long long)config.V);
}

// An empty prompt becomes a line break: a model has to be fed something, and text begins after one.
std::vector<int32_t> prompt_tokens(const Config& config, const Tokenizer& tokenizer, const std::string& prompt) {
    const std::vector<int32_t> ids = tokenizer.encode(prompt.empty() ? "\n" : prompt);
    if (ids.empty()) fail("prompt: the tokenizer makes no token of it");
    for (const int32_t id : ids) check_token("prompt", id, config);
    return ids;
}

}  // namespace

void Engine::decode_greedy(State& state, const int32_t* last, int64 count, int64 vocab, int32_t* chosen) {
    Sampler greedy;
    greedy.temperature = 0;
    std::vector<int32_t> next(last, last + state.B);
    std::vector<float> logits(size_t(state.B * config.V));
    for (int64 i = 0; i < count; ++i) {
        step(state, next.data(), 1, logits.data());
        for (int64 b = 0; b < state.B; ++b)
            chosen[b * count + i] = next[size_t(b)] = greedy.choose(logits.data() + b * config.V, vocab, 0);
    }
}

void generate(Engine& engine, const Tokenizer& tokenizer, const std::string& prompt, int64 count,
              const Sampler& sampler, const std::function<void(const std::string& bytes)>& out) {
    const Config& c = engine.config;
    const std::vector<int32_t> ids = prompt_tokens(c, tokenizer, prompt);
    if (count < 1) return;
    const int64 n = int64(ids.size()), vocab = std::min(c.V, tokenizer.vocab_size());
    const std::unique_ptr<State> state = engine.new_state(1, n + count);
    std::vector<float> logits(static_cast<size_t>(c.V));
    for (int64 i = 0; i < n; i += c.T)  // in pieces, so that a long prompt needs no more memory than training did
        engine.step(*state, ids.data() + i, std::min(c.T, n - i), logits.data());
    // Greedy: a few tokens at a time without their logits, if the engine can; what follows an end of text is dropped.
    const bool greedy = sampler.temperature == 0;
    std::vector<int32_t> ids_made{sampler.choose(logits.data(), vocab, 0)};
    for (int64 made = 0;;) {
        for (const int32_t id : ids_made) {
            if (id == tokenizer.end_of_text()) return;
            out(tokenizer.bytes_of(id));
        }
        made += int64(ids_made.size());
        if (made == count) return;
        const int32_t last = ids_made.back();
        ids_made.resize(greedy ? size_t(std::min<int64>(8, count - made)) : 1);
        if (greedy) {
            engine.decode_greedy(*state, &last, int64(ids_made.size()), vocab, ids_made.data());
        } else {
            engine.step(*state, &last, 1, logits.data());
            ids_made[0] = sampler.choose(logits.data(), vocab, uint64_t(made));
        }
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Evaluation
// ---------------------------------------------------------------------------------------------------------------------

Evaluation evaluate(Engine& engine, const Tokenizer& tokenizer, const std::vector<int32_t>& tokens, int64 B, int64 T) {
    if (B < 1 || T < 1) fail("evaluation in batches of %lld windows of %lld tokens", (long long)B, (long long)T);
    if (tokens.size() < 2) fail("evaluation needs at least 2 tokens, found %zu", tokens.size());
    Evaluation e;
    e.tokens = int64(tokens.size()) - 1;
    for (const int32_t id : tokens) check_token("evaluation", id, engine.config);
    for (size_t i = 1; i < tokens.size(); ++i) e.bytes += int64(tokenizer.bytes_of(tokens[i]).size());

    // Window w predicts tokens wT+1 .. wT+T from those before them. Neighbouring windows lie one after the other in
    // `tokens`, so that B of them are already a (B,T) batch.
    double nats = 0;
    for (int64 at = 0; at < e.tokens;) {
        const int64 windows = std::min(B, (e.tokens - at) / T);
        const int64 rows = windows > 0 ? windows : 1, length = windows > 0 ? T : e.tokens - at;
        const double loss = engine.forward(tokens.data() + at, tokens.data() + at + 1, rows, length);
        nats += loss * double(rows * length);
        at += rows * length;
    }
    e.nats_per_token = nats / double(e.tokens);
    return e;
}

// ---------------------------------------------------------------------------------------------------------------------
// Descriptions
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// "0-6 SSD, 7 attention, 8-14 SSD"
std::string layer_plan(const Config& c) {
    std::string plan;
    for (int64 i = 0; i < c.L;) {
        int64 last = i;
        while (last + 1 < c.L && c.is_attention(last + 1) == c.is_attention(i)) ++last;
        plan += (plan.empty() ? "" : ", ") + std::to_string(i) + (last > i ? "-" + std::to_string(last) : "") +
                (c.is_attention(i) ? " attention" : " SSD");
        i = last + 1;
    }
    return plan;
}

int64 attention_layers(const Config& c) {
    int64 n = 0;
    for (int64 i = 0; i < c.L; ++i) n += c.is_attention(i);
    return n;
}

// What a forward pass in fp32 keeps for its backward pass, in bytes (LayerActivations, and the head). In floating
// point: it is an estimate, and must not overflow where the answer is "far too much".
double activation_bytes(const Config& c, int64 B, int64 T) {
    const double rows = double(B) * double(T), D = double(c.D), H = double(c.H);
    const double attention = double(attention_layers(c)), ssd = double(c.L) - attention;
    const double both = rows * (5 * D + 3 * double(c.F) + 2);  // x, u1, y, x_mid, u2; gate_up, h; rstd1, rstd2
    const double per_ssd = rows * (double(c.ssd_width()) + 2 * H) + double(B) * double(c.chunks(T)) * D * double(c.N);
    const double per_attention = rows * (double(c.attn_width()) + H);
    return 4 * (double(c.L) * both + ssd * per_ssd + attention * per_attention + rows * (2 * D + double(c.V) + 2));
}

}  // namespace

double flops_per_token(const Config& c, int64 T) {
    const ParamTable table(c);
    const double attention = double(attention_layers(c)), ssd = double(c.L) - attention;
    double weights = c.tie ? 0.0 : -double(c.V * c.D);  // the embedding multiplies only as the tied head
    for (const ParamSpec& s : table.specs) weights += s.shape.size() == 2 ? double(s.count) : 0.0;
    // a query meets (T+1)/2 keys on average: 2 P for the score, 2 P for the value; a state takes 2 N P to update and to read
    return 6 * weights + 3 * double(c.D) * (attention * 2 * (double(T) + 1) + ssd * 4 * double(c.N));
}

std::string describe(const Config& c, int64 B, int64 T) {
    const ParamTable table(c);
    const int64 attention = attention_layers(c), ssd = c.L - attention;
    const char* const family = attention == 0 ? "pure state space" : ssd == 0 ? "plain Transformer" : "hybrid";
    std::string s;
    s += format("model       %s, %lld layers of width %lld, vocabulary %lld, %s head, trained at length %lld\n", family,
                (long long)c.L, (long long)c.D, (long long)c.V, c.tie ? "tied" : "untied", (long long)c.T);
    const std::string groups = c.Hkv < c.H ? format(" (%lld for keys and values)", (long long)c.Hkv) : "";
    s += format("heads       %lld of %lld%s, state size %lld, chunks of %lld, feed-forward %lld%s%s\n", (long long)c.H,
                (long long)c.P(), groups.c_str(), (long long)c.N, (long long)c.Q, (long long)c.F,
                c.ssd_decay ? "" : ", no decay", c.dropout > 0 ? (", dropout " + to_text(c.dropout)).c_str() : "");
    s += "layers      " + layer_plan(c) + "\n";
    if (attention == 0 && c.attn_period > 0)
        s += format("note        no layer is an attention layer: the first would be layer %lld, of layers 0-%lld%s\n",
                    (long long)c.attn_offset, (long long)c.L - 1,
                    c.attn_offset >= c.attn_period
                        ? format(" (attn_layer_offset %lld is not below attn_layer_period %lld)",
                                 (long long)c.attn_offset, (long long)c.attn_period)
                              .c_str()
                        : "");
    const int64 head = c.V * c.D, mixed = table.count - (c.tie ? 1 : 2) * head;
    s += format("parameters  %s (%s in fp32): embedding %s, layers %s", with_commas(table.count).c_str(),
                byte_text(4 * double(table.count)).c_str(), with_commas(head).c_str(), with_commas(mixed).c_str());
    s += c.tie ? "\n" : ", head " + with_commas(head) + "\n";
    s += "state       ";
    if (ssd > 0) s += byte_text(4 * double(ssd * c.D * c.N)) + " per sequence for SSD layers";
    if (ssd > 0 && attention > 0) s += ", ";
    if (attention > 0) s += byte_text(8 * double(attention * c.Hkv * c.P())) + " per token for attention layers";
    s += "\n";
    if (B > 0 && T > 0) {
        const double fixed = 16 * double(table.count), kept = activation_bytes(c, B, T);
        s += format(
            "memory      training %lld x %lld tokens on the CPU: about %s (weights, gradients and moments %s, activations "
            "%s)\n",
            (long long)B, (long long)T, byte_text(fixed + kept).c_str(), byte_text(fixed).c_str(),
            byte_text(kept).c_str());
    }
    return s;
}

// ---------------------------------------------------------------------------------------------------------------------
// Plots
// ---------------------------------------------------------------------------------------------------------------------

namespace {

// 1, 2 or 5 times a power of ten, so that about `count` of them make up `range`.
double nice_interval(double range, int count) {
    const double rough = range / count, power = std::pow(10.0, std::floor(std::log10(rough)));
    for (const double m : {1.0, 2.0, 5.0})
        if (rough <= m * power * (1 + 1e-9)) return m * power;
    return 10 * power;
}

std::string xml_escaped(const std::string& s) {
    std::string out, pending;
    for (const char c : utf8_stream(&pending, s, true)) {
        if (c == '&') out += "&amp;";
        else if (c == '<') out += "&lt;";
        else if (c == '>') out += "&gt;";
        else out += uint8_t(c) < 0x20 ? ' ' : c;
    }
    return out;
}

const double plot_width = 1060, plot_height = 480;

std::string plot_svg(Plot plot) {
    static const char* const colors[] = {"#1f6fb4", "#d1495b", "#2a9d5c", "#e9a03b", "#7b5ea7", "#4bb3c9", "#8c6d46",
                                         "#d67fb4", "#7f8c8d", "#a3b84c", "#9ecae9", "#f2a1ab", "#93d4ae", "#c3b1e1"};
    const double left = 110, right = 330, top = 48, bottom = 60;
    const double width = plot_width - left - right, height = plot_height - top - bottom;
    const bool bars = !plot.bars.empty();

    // Parts of bars are put on top of those before them: y becomes their upper end, and what was there their lower end.
    std::vector<double> reached(plot.bars.size(), 0.0);
    std::vector<std::vector<double>> lower(plot.curves.size());
    for (size_t i = 0; i < plot.curves.size(); ++i) {
        Plot::Curve& c = plot.curves[i];
        if (c.color.empty()) c.color = colors[i % (sizeof colors / sizeof *colors)];
        std::vector<std::pair<double, double>> finite;
        for (const auto& p : c.points)
            if (std::isfinite(p.first) && std::isfinite(p.second) && !(plot.log_x && p.first <= 0)) finite.push_back(p);
        for (auto& p : finite)
            if (bars) {
                double& end = reached.at(size_t(p.first));
                lower[i].push_back(end);
                p.second = end += p.second;
            }
        c.points = finite;
    }

    // The axes hold every point unless the caller chose their ends.
    double x_low = HUGE_VAL, x_high = -HUGE_VAL, y_low = HUGE_VAL, y_high = -HUGE_VAL;
    for (const Plot::Curve& c : plot.curves)
        for (const auto& p : c.points) {
            x_low = std::min(x_low, p.first);
            x_high = std::max(x_high, p.first);
            y_low = std::min(y_low, p.second);
            y_high = std::max(y_high, p.second);
        }
    if (!(x_low <= x_high)) x_low = 1, x_high = 2, y_low = 0, y_high = 1;  // no point at all
    if (bars) x_low = -0.5, x_high = double(plot.bars.size()) - 0.5, y_low = 0;
    if (std::isfinite(plot.x_low)) x_low = plot.x_low;
    if (std::isfinite(plot.x_high)) x_high = plot.x_high;
    if (x_low == x_high) x_low /= plot.log_x ? 2 : 1, x_high = plot.log_x ? 2 * x_high : x_high + 1;
    if (std::isfinite(plot.y_high)) y_high = plot.y_high;
    if (std::isfinite(plot.y_low)) y_low = plot.y_low;
    y_high = std::max(y_low, y_high);
    const double margin = std::max(0.04 * (y_high - y_low), 1e-4 * std::max(1.0, std::fabs(y_low)));
    if (!bars && !std::isfinite(plot.y_low)) y_low = y_low >= 0 ? std::max(0.0, y_low - margin) : y_low - margin;
    y_high += margin;
    const double y_tick = nice_interval(y_high - y_low, 6);
    const auto scale = [&](double x) { return plot.log_x ? std::log2(x) : x; };
    const auto px = [&](double x) {
        const double share = (scale(x) - scale(x_low)) / (scale(x_high) - scale(x_low));
        return left + width * std::min(1.0, std::max(0.0, share));
    };
    const auto py = [&](double y) {
        return top + height * (y_high - std::min(y_high, std::max(y_low, y))) / (y_high - y_low);
    };

    std::string s = format("<text x=\"%.0f\" y=\"28\" font-size=\"16\" font-weight=\"bold\">%s</text>\n", left,
                           xml_escaped(plot.title).c_str());

    // grid, ticks and labels
    const int decimals = std::min(9, std::max(0, int(std::ceil(-std::log10(y_tick) - 1e-9))));
    for (double k = std::ceil(y_low / y_tick); k * y_tick <= y_high; ++k) {
        const double v = k * y_tick, y = py(v);
        s += format("<path d=\"M%.1f %.1fH%.1f\" stroke=\"#e4e4e4\"/>", left, y, left + width);
        s += format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"end\">%s</text>\n", left - 9, y + 4.5,
                    decimals ? format("%.*f", decimals, v).c_str() : with_commas(llround(v)).c_str());
    }
    const auto mark_x = [&](double x, const std::string& text) {
        s += format("<path d=\"M%.1f %.1fv6\" stroke=\"#333\"/>", px(x), top + height);
        s += format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n", px(x), top + height + 21,
                    xml_escaped(text).c_str());
    };
    if (bars) {
        for (size_t i = 0; i < plot.bars.size(); ++i) mark_x(double(i), plot.bars[i]);
    } else if (plot.log_x) {
        const double octaves = std::floor(std::log2(x_high) - std::ceil(std::log2(x_low)) + 1e-9);
        const double x_tick = std::max(1.0, std::ceil(octaves / 8));
        for (double k = std::ceil(std::log2(x_low) - 1e-9); k <= std::log2(x_high) + 1e-9; k += x_tick)
            mark_x(std::exp2(k), with_commas(llround(std::exp2(k))));
    } else {
        const double x_tick = std::max(1.0, nice_interval(x_high - x_low, 8));
        for (double k = std::ceil(x_low / x_tick); k * x_tick <= x_high * (1 + 1e-9); ++k)
            mark_x(k * x_tick, with_commas(llround(k * x_tick)));
    }
    s += format("<path d=\"M%.1f %.1fV%.1fH%.1f\" fill=\"none\" stroke=\"#333\"/>\n", left, top, top + height,
                left + width);
    s += format("<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"middle\">%s</text>\n", left + width / 2, plot_height - 16,
                xml_escaped(plot.x_label).c_str());
    s += format("<text transform=\"translate(20 %.1f) rotate(-90)\" text-anchor=\"middle\">%s</text>\n",
                top + height / 2, xml_escaped(plot.y_label).c_str());

    double legend = top + 12;
    for (size_t i = 0; i < plot.curves.size(); ++i) {
        const Plot::Curve& c = plot.curves[i];
        const std::string stroke = format("stroke=\"%s\" stroke-width=\"%g\"", c.color.c_str(), c.width);
        const auto dot = [&](double x, double y) {
            s += format("<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>", x, y, c.color.c_str());
        };
        const auto box = [&](double x, double y, double w, double h) {
            s += format("<rect x=\"%.1f\" y=\"%.1f\" width=\"%.1f\" height=\"%.1f\" fill=\"%s\"/>", x, y, w, h,
                        c.color.c_str());
        };
        const double half = bars ? 0.3 * width / double(plot.bars.size()) : 0;
        std::string line;
        for (size_t j = 0; j < c.points.size(); ++j) {
            const double x = px(c.points[j].first), y = py(c.points[j].second);
            line += format("%s%.1f %.1f", line.empty() ? "M" : " L", x, y);
            if (bars) box(x - half, y, 2 * half, py(lower[i][j]) - y);
            else if (c.dots) dot(x, y);
        }
        if (!bars && c.width > 0 && !line.empty())
            s += "<path d=\"" + line + "\" fill=\"none\" stroke-linejoin=\"round\" " + stroke + "/>";
        if (c.label.empty()) continue;
        const double lx = left + width + 18;
        if (bars) box(lx, legend - 7, 14, 14);
        else if (c.width > 0) s += format("<path d=\"M%.0f %.0fh24\" %s/>", lx, legend, stroke.c_str());
        if (!bars && c.dots) dot(lx + 12, legend);
        s += format("<text x=\"%.0f\" y=\"%.1f\">%s</text>\n", lx + (bars ? 22 : 32), legend + 4.5,
                    xml_escaped(c.label).c_str());
        legend += 20;
    }
    return s;
}

}  // namespace

std::string plots_svg(const std::vector<Plot>& plots) {
    const double H = plot_height * double(plots.size());
    std::string s = format(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%.0f\" height=\"%.0f\" viewBox=\"0 0 %.0f %.0f\" "
        "font-family=\"Helvetica, Arial, DejaVu Sans, sans-serif\" font-size=\"13\" fill=\"#333\">\n"
        "<rect width=\"100%%\" height=\"100%%\" fill=\"#fff\"/>\n",
        plot_width, H, plot_width, H);
    for (size_t i = 0; i < plots.size(); ++i)
        s += format("<g transform=\"translate(0 %.0f)\">\n", plot_height * double(i)) + plot_svg(plots[i]) + "</g>\n";
    return s + "</svg>\n";
}

// ---------------------------------------------------------------------------------------------------------------------
// Figures of a benchmark
// ---------------------------------------------------------------------------------------------------------------------

namespace {

const char* const bench_columns =
    "case,engine,model,what,B,T,runs,ms,ms_25,ms_75,tokens_per_s,bytes,flops,memory,share_of_copy,share_of_gemm,note";

}  // namespace

// A field that was not measured or counted is empty; a comma in a text becomes a semicolon.
std::string bench_csv(const std::vector<BenchRow>& rows) {
    const auto number = [](double v) { return std::isfinite(v) && v > 0 ? format("%.6g", v) : std::string(); };
    const auto words = [](std::string v) {
        std::replace(v.begin(), v.end(), ',', ';');
        return v;
    };
    std::string s = std::string(bench_columns) + "\n";
    for (const BenchRow& r : rows) {
        s += r.kind + "," + words(r.engine) + "," + words(r.model) + "," + words(r.what) + "," + std::to_string(r.B) +
             "," + std::to_string(r.T) + "," + std::to_string(r.runs);
        for (const double v :
             {r.ms, r.ms_25, r.ms_75, r.tokens_per_s(), r.bytes, r.flops, r.memory, r.copy_share, r.gemm_share})
            s += "," + number(v);
        s += "," + words(r.note) + "\n";
    }
    return s;
}

// What plots need of a file that bench_csv, or test/bench_pytorch.py, wrote.
void read_bench_csv(const std::string& path, std::vector<BenchRow>* rows) {
    const std::string s = read_file(path);
    int64 line = 0;
    for (size_t at = 0; at < s.size(); ++line) {
        const size_t end = std::min(s.find('\n', at), s.size());
        const std::string text = s.substr(at, end - at);
        at = end + 1;
        if (line == 0 && text != bench_columns)
            fail("%s: not a file of benchmark figures: expected the first line %s", path.c_str(), bench_columns);
        if (line == 0) continue;
        std::vector<std::string> f(1);
        for (const char c : text) {
            if (c == ',') f.emplace_back();
            else f.back() += c;
        }
        if (f.size() != 17)
            fail("%s: line %lld: expected 17 fields, found %zu", path.c_str(), (long long)line + 1, f.size());
        BenchRow r = BenchRow(f[0], f[2], f[3], 0, 0);
        r.engine = f[1];
        double per_s = 0;
        if (!parse_int(f[4], &r.B) || !parse_int(f[5], &r.T) || (!f[7].empty() && !parse_double(f[7], &r.ms)) ||
            (!f[10].empty() && !parse_double(f[10], &per_s)))
            fail("%s: line %lld: B, T, ms or tokens_per_s is not a number", path.c_str(), (long long)line + 1);
        r.tokens = per_s * r.ms / 1e3;
        rows->push_back(r);
    }
    if (line == 0) fail("%s: is empty", path.c_str());
}

// Throughput against length, time per token against context, and one step's launches on top of one another.
std::string bench_svg(const std::vector<BenchRow>& rows) {
    std::vector<Plot> plots;
    const auto point = [&](const std::string& title, const char* x_label, const char* y_label, const std::string& label,
                           double x, double y) {
        auto p = std::find_if(plots.begin(), plots.end(), [&](const Plot& q) { return q.title == title; });
        if (p == plots.end()) {
            p = plots.insert(p, Plot(title, x_label, y_label));
            p->log_x = true;
            p->y_low = 0;
        }
        auto c =
            std::find_if(p->curves.begin(), p->curves.end(), [&](const Plot::Curve& q) { return q.label == label; });
        if (c == p->curves.end()) {
            c = p->curves.insert(c, Plot::Curve());
            c->label = label;
        }
        c->points.emplace_back(x, y);
    };
    const std::map<std::string, std::string> title = {{"step", "Training"},
                                                      {"evaluation", "Evaluation"},
                                                      {"prefill", "Prefill"},
                                                      {"ssd", "SSD"},
                                                      {"attention", "Attention"}};
    Plot step("One training step", "", "ms");
    std::vector<double> total;  // of each bar
    const auto name_of = [](const BenchRow& r) { return (r.engine == "transxssm" ? "" : r.engine + ": ") + r.model; };
    const auto bar_of = [&](const std::string& who) {
        const size_t i = size_t(std::find(step.bars.begin(), step.bars.end(), who) - step.bars.begin());
        if (i == step.bars.size()) {
            step.bars.push_back(who);
            total.push_back(0);
        }
        return i;
    };
    for (const BenchRow& r : rows) {
        if (!(r.ms > 0)) continue;
        const std::string who = name_of(r);
        if (r.kind == "train" || r.kind == "prefill")
            point(title.count(r.what) ? title.at(r.what) : r.what, "tokens of a sequence", "tokens/s", who, double(r.T),
                  r.tokens_per_s());
        if ((r.kind == "ssd" || r.kind == "attention") && r.what != "backward")
            point(title.at(r.kind) + ", " + r.what, "tokens of a sequence", "ms", who, double(r.T), r.ms);
        if (r.kind == "decode")
            point(format("Decoding %lld sequence%s", (long long)r.B, r.B == 1 ? "" : "s"), "tokens before",
                  "ms per token", who, double(r.T), r.ms);
        if (r.kind == "launches") total[bar_of(who)] += r.ms;
    }
    if (step.bars.empty()) return plots_svg(plots);
    // A kind of launch that is nowhere 2% of its step is one of the others, which are on top.
    std::map<std::string, size_t> part;
    Plot::Curve others;
    others.label = "others";
    others.color = "#cccccc";
    for (const int pass : {0, 1})
        for (const BenchRow& r : rows) {
            if (r.kind != "launches" || !(r.ms > 0)) continue;
            const size_t bar = bar_of(name_of(r));
            if (pass == 0 && r.ms > 0.02 * total[bar] && part.emplace(r.what, step.curves.size()).second) {
                step.curves.emplace_back();
                step.curves.back().label = r.what;
            }
            if (pass == 1)
                (part.count(r.what) ? step.curves[part[r.what]] : others).points.emplace_back(double(bar), r.ms);
        }
    if (!others.points.empty()) step.curves.push_back(others);
    plots.push_back(step);
    return plots_svg(plots);
}

// ---------------------------------------------------------------------------------------------------------------------
// Commands: sample, eval, info, export, import
// ---------------------------------------------------------------------------------------------------------------------

namespace {

struct LoadedModel {
    std::string dir;
    Config config;
    std::vector<float> weights;
    std::unique_ptr<Tokenizer> tokenizer;

    explicit LoadedModel(const std::string& given) : dir(resolve_checkpoint(given)) {
        config = load_config(dir);
        const std::string file = dir + "/tokenizer.json";
        if (!file_exists(file))
            fail("%s: is missing%s", file.c_str(),
                 config.V == 256 ? "; if tokens are bytes, `ref_cpu import` makes a checkpoint that has one" : "");
        tokenizer = load_tokenizer(file);
        weights = load_weights(dir, config);
    }
    std::unique_ptr<Engine> start(const EngineFactory& factory, const std::string& precision) {
        std::unique_ptr<Engine> engine = factory(config, precision);
        engine->write(Buffer::weights, weights.data());
        std::vector<float>().swap(weights);
        return engine;
    }
};

// What a program computes with: the option --precision of `sample` and `eval`.
struct EngineChoice {
    const std::vector<std::string>& precisions;  // the first is the default
    const EngineFactory& factory;
    std::string precision, help;

    void add_options(Options* options) {
        precision = precisions[0];
        help = precisions[0];
        for (size_t i = 1; i < precisions.size(); ++i) help += " or " + precisions[i];
        options->add("precision", &precision, help.c_str());
    }
    void check() const {
        if (std::find(precisions.begin(), precisions.end(), precision) == precisions.end())
            usage_error("--precision: '%s' is not %s", precision.c_str(), help.c_str());
    }
};

// The one word that is not an option.
std::string model_directory(const std::string& command, const std::vector<std::string>& words) {
    if (words.empty()) usage_error("%s: which model? expected a checkpoint directory", command.c_str());
    if (words.size() > 1) usage_error("%s: unexpected word '%s'", command.c_str(), words[1].c_str());
    return words[0];
}

int sample_command(const std::string& program, int argc, char** argv, EngineChoice engine_choice) {
    std::string prompt, prompt_file;
    int64 count = 256;
    Sampler sampler;
    std::vector<std::string> words;
    Options options(program,
                    "usage: " + program +
                        " sample DIR [options]\n\n"
                        "Continues a prompt. The text goes to standard output, everything else to standard error.");
    options.add("prompt", &prompt, "text to continue; without one the text begins afresh");
    options.add("prompt-file", &prompt_file, "read the prompt from a file, or from standard input (-)");
    options.add("tokens", &count, "tokens to sample", 0, INT32_MAX);
    sampler.add_options(&options);
    engine_choice.add_options(&options);
    if (!options.parse(argc, argv, 1, &words)) return 0;
    engine_choice.check();
    const std::string dir = model_directory("sample", words);
    if (options.given("prompt") && options.given("prompt-file"))
        usage_error("sample: --prompt and --prompt-file exclude each other");
    if (options.given("prompt-file")) prompt = read_input(prompt_file);

    LoadedModel model(dir);
    prompt_tokens(model.config, *model.tokenizer, prompt);  // refuse it before anything is shown
    const std::unique_ptr<Engine> engine = model.start(engine_choice.factory, engine_choice.precision);
    fprintf(stderr, "%s on %s; %lld tokens, temperature %s, top-k %lld, top-p %s, min-p %s, seed %llu\n",
            model.dir.c_str(), engine->device().c_str(), (long long)count, to_text(sampler.temperature).c_str(),
            (long long)sampler.top_k, to_text(sampler.top_p).c_str(), to_text(sampler.min_p).c_str(),
            (unsigned long long)sampler.seed);

    // Bytes of a character that is not whole yet wait in `pending`.
    std::string pending;
    const bool terminal = isatty(1);
    const auto show = [&](const std::string& bytes, bool last) {
        const std::string whole = utf8_stream(&pending, bytes, last), text = terminal ? terminal_text(whole) : whole;
        fwrite(text.data(), 1, text.size(), stdout);
        if (fflush(stdout) != 0 || ferror(stdout)) fail("standard output: %s", strerror(errno));
    };
    show(prompt, false);
    int64 made = 0;
    const double start = wall_seconds();
    generate(*engine, *model.tokenizer, prompt, count, sampler, [&](const std::string& bytes) {
        show(bytes, false);
        ++made;
    });
    const double seconds = wall_seconds() - start;
    show("", true);
    printf("\n");
    fflush(stdout);
    fprintf(stderr, "%lld tokens in %.2f s, %.0f tokens/s\n", (long long)made, seconds,
            double(made) / std::max(seconds, 1e-9));
    return 0;
}

int eval_command(const std::string& program, int argc, char** argv, EngineChoice engine_choice) {
    std::vector<std::string> words, files;
    int64 batch = 8, length = 0;
    Options options(program, "usage: " + program +
                                 " eval DIR --data FILE...\n\n"
                                 "Mean loss on text, in disjoint windows that each begin from the zero state.");
    options.add("data", &files, "text files, one after the other");
    options.add("batch", &batch, "windows at a time", 1, INT32_MAX);
    options.add("seq-len", &length, "tokens per window; 0: the length the model was trained at", 0, INT32_MAX);
    engine_choice.add_options(&options);
    if (!options.parse(argc, argv, 1, &words)) return 0;
    engine_choice.check();
    const std::string dir = model_directory("eval", words);
    if (files.empty()) usage_error("eval: --data is missing: which text?");

    LoadedModel model(dir);
    std::vector<int32_t> tokens;
    int64 size = 0;
    for (const std::string& file : files) {
        const std::string text = read_input(file);
        if (text.empty()) fail("%s: is empty", file.c_str());
        size += int64(text.size());
        const int32_t end = model.tokenizer->end_of_text();
        if (!tokens.empty() && end >= 0) tokens.push_back(end);
        const std::vector<int32_t> ids = model.tokenizer->encode(text);
        for (const int32_t id : ids) check_token(file.c_str(), id, model.config);
        tokens.insert(tokens.end(), ids.begin(), ids.end());
    }
    if (tokens.size() < 2)
        fail("%s: %zu token, at least 2 are needed: one to begin with and one to predict", files[0].c_str(),
             tokens.size());
    const std::unique_ptr<Engine> engine = model.start(engine_choice.factory, engine_choice.precision);
    if (length == 0) length = model.config.T;
    printf("model       %s on %s\n", model.dir.c_str(), engine->device().c_str());
    printf("data        %s%s, %s bytes; windows of %lld, %lld at a time\n", files[0].c_str(),
           files.size() > 1 ? format(" and %zu more", files.size() - 1).c_str() : "", with_commas(size).c_str(),
           (long long)length, (long long)batch);
    fflush(stdout);

    const double start = wall_seconds();
    const Evaluation e = evaluate(*engine, *model.tokenizer, tokens, batch, length);
    const double seconds = wall_seconds() - start;
    if (!std::isfinite(e.nats_per_token))
        fail("%s: the loss is %g: %s", model.dir.c_str(), e.nats_per_token, engine->find_non_finite().c_str());
    printf("loss        %.6f nats per token\n", e.nats_per_token);
    printf("perplexity  %.6f\n", e.perplexity());
    printf("bits/byte   %.6f\n", e.bits_per_byte());
    printf("predicted   %s tokens, %s bytes (%.1f s, %.0f tokens/s)\n", with_commas(e.tokens).c_str(),
           with_commas(e.bytes).c_str(), seconds, double(e.tokens) / std::max(seconds, 1e-9));
    return 0;
}

// One line per kind of tensor: its name with I for the layer, shape, how many, and the root mean square of its values.
void print_tensors(const Config& config, const std::vector<float>& weights) {
    struct Kind {
        std::string name, shape;
        int64 tensors, elements;
        double squares;
    };
    std::vector<Kind> kinds;
    const ParamTable table(config);
    std::map<Param, size_t> index;
    for (const ParamSpec& s : table.specs) {
        if (!index.count(s.param)) {
            index[s.param] = kinds.size();
            std::string name = s.name;
            const std::string number = "." + std::to_string(s.layer) + ".";
            if (s.layer >= 0) name.replace(name.find(number), number.size(), ".I.");
            kinds.push_back({name, to_text(s.shape), 0, 0, 0});
        }
        Kind& k = kinds[index[s.param]];
        ++k.tensors;
        k.elements += s.count;
        for (int64 i = 0; i < s.count; ++i) {
            const double v = double(weights[size_t(s.offset + i)]);
            k.squares += v * v;
        }
    }
    printf("\n%-48s %-14s %8s %16s %10s\n", "tensor", "shape", "tensors", "elements", "rms");
    for (const Kind& k : kinds)
        printf("%-48s %-14s %8lld %16s %10.4f\n", k.name.c_str(), k.shape.c_str(), (long long)k.tensors,
               with_commas(k.elements).c_str(), std::sqrt(k.squares / double(k.elements)));
}

int info_command(const std::string& program, int argc, char** argv) {
    std::vector<std::string> words;
    int64 batch = 1, length = 0;
    Options options(program, "usage: " + program +
                                 " info DIR\n\n"
                                 "What a model directory holds: layers, parameters, memory, tokenizer, tensors.");
    options.add("batch", &batch, "sequences, for the memory of a training step", 1, INT32_MAX);
    options.add("seq-len", &length, "their length; 0: the length the model was trained at", 0, INT32_MAX);
    if (!options.parse(argc, argv, 1, &words)) return 0;
    const LoadedModel model(model_directory("info", words));
    printf("directory   %s\n", model.dir.c_str());
    const std::string trainer = model.dir + "/trainer.json";
    if (file_exists(trainer)) {
        const Json j = Json::parse(read_file(trainer), trainer);
        int64 step;
        if (const Json* s = j.find("step"))
            if (s->integer(&step)) printf("step        %s\n", with_commas(step).c_str());
    }
    printf("%s", describe(model.config, batch, length ? length : model.config.T).c_str());
    const int32_t end = model.tokenizer->end_of_text();
    printf("tokenizer   %s tokens, %s\n", with_commas(model.tokenizer->vocab_size()).c_str(),
           end < 0 ? "no end-of-text token" : format("end of text is %d", end).c_str());
    print_tensors(model.config, model.weights);
    return 0;
}

int exchange_command(const std::string& program, int argc, char** argv) {
    const std::string command = argv[0];
    const bool exporting = command == "export";
    std::vector<std::string> words;
    Options options(
        program,
        "usage: " + program + " " + command + " DIR OUT\n\n" +
            (exporting ? "Writes the model in DIR to the new directory OUT, for the published PyTorch module."
                       : "Makes the new directory OUT, a checkpoint, of the published PyTorch module's files in DIR."));
    if (!options.parse(argc, argv, 1, &words)) return 0;
    if (words.size() != 2)
        usage_error("%s: expected two words, DIR (the model) and OUT (a new directory), found %zu", command.c_str(),
                    words.size());
    (exporting ? export_model : import_model)(words[0], words[1]);
    const bool bytes = !file_exists(resolve_checkpoint(words[0]) + "/tokenizer.json");
    printf("%s is %s\n", words[1].c_str(),
           exporting ? "for the published PyTorch module"
           : bytes   ? "a checkpoint; there was no tokenizer.json: its tokens are bytes"
                     : "a checkpoint");
    return 0;
}

}  // namespace

int model_command(const std::string& program, int argc, char** argv, const std::vector<std::string>& precisions,
                  const EngineFactory& factory, const std::vector<std::string>& other_commands) {
    const std::string command = argc > 0 ? argv[0] : "";
    const EngineChoice choice{precisions, factory, "", ""};
    if (command == "sample") return sample_command(program, argc, argv, choice);
    if (command == "eval") return eval_command(program, argc, argv, choice);
    if (command == "info") return info_command(program, argc, argv);
    if (command == "export" || command == "import") return exchange_command(program, argc, argv);
    std::vector<std::string> known = {"sample", "eval", "info", "export", "import"};
    known.insert(known.end(), other_commands.begin(), other_commands.end());
    usage_error("unknown command '%s'; did you mean '%s'?", command.c_str(), nearest_word(command, known).c_str());
}

const char* model_command_help() {
    return "    sample DIR            continue a prompt with the model in DIR\n"
           "    eval DIR --data FILE  loss, perplexity and bits per byte on a text\n"
           "    info DIR              layers, parameters, training state\n"
           "    export DIR OUT        write the model in DIR for the published PyTorch module\n"
           "    import DIR OUT        make a checkpoint of the published PyTorch module's files in DIR\n";
}

// ---------------------------------------------------------------------------------------------------------------------
// 17  The oracle: every number on the way, in double                                                     docs/oracle.md
// ---------------------------------------------------------------------------------------------------------------------
// A task holds what is given (weights, tokens, cotangents, an op's inputs). run_model or run_op computes from it, in float
// or double, with a probe that notes every tensor and, for a run in bf16, rounds it. The same run in less precision is how
// the tolerances are measured, and how `oracle --precision` makes a candidate of this program's own.

#ifdef REF_CPU_MAIN
namespace ref {
namespace {

struct NamedTensor {
    std::string name;
    DType dtype;  // of the file: F64, F32 or I64
    Shape shape;
    Vec values;  // integers too: a double holds them exactly
};

const NamedTensor* find(const std::vector<NamedTensor>& tensors, const std::string& name) {
    for (const NamedTensor& t : tensors)
        if (t.name == name) return &t;
    return nullptr;
}

bool starts_with(const std::string& s, const std::string& prefix) { return s.compare(0, prefix.size(), prefix) == 0; }

// Rounds to the nearest bf16 value, ties to even; NaN and infinity stay.
float round_bf16(float x) {
    if (!std::isfinite(x)) return x;
    uint32_t bits;
    memcpy(&bits, &x, 4);
    bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
    memcpy(&x, &bits, 4);
    return x;
}

struct OracleTask {
    std::string kind = "model";  // or an op
    Config config;
    int64 B = 2, T = 0;  // T 0: the config's
    uint64_t seed = 1;
    bool state_cotangent = true, intermediates = true, decode = true;
    int64 adamw_steps = 10;
    AdamW adamw;
    double lr = 1e-3, clip = 1;
    std::vector<NamedTensor> given;

    const Vec& at(const std::string& name) const { return find(given, name)->values; }
    std::vector<int32_t> ids(const std::string& name) const {
        const Vec& v = at(name);
        return std::vector<int32_t>(v.begin(), v.end());
    }
};

// ---- what is given --------------------------------------------------------------------------------------------------

// mean + scale * normal, on the bf16 grid, a function of (seed, name) alone
NamedTensor draw(uint64_t seed, const std::string& name, const Shape& shape, double mean, double scale,
                 DType dtype = DType::F64) {
    NamedTensor t{name, dtype, shape, Vec(size_t(element_count(shape)))};
    const Philox stream(seed, ("oracle " + name).c_str());
    for (size_t i = 0; i < t.values.size(); ++i)
        t.values[i] = double(round_bf16(float(mean + scale * stream.normal_at(uint64_t(i)))));
    return t;
}
NamedTensor draw_ids(uint64_t seed, const std::string& name, const Shape& shape, int64 V) {
    NamedTensor t{name, DType::I64, shape, Vec(size_t(element_count(shape)))};
    const Philox stream(seed, ("oracle " + name).c_str());
    for (size_t i = 0; i < t.values.size(); ++i) t.values[i] = double(stream.at(uint64_t(i)).word[0] % uint64_t(V));
    return t;
}

// Weights that let no mistake hide: norm and residual weights away from 1, and projections of such a scale that
// activations, attention scores and gates are of order 1. The embedding keeps its small scale, so that the epsilon of the
// first norm can be seen. A_log and dt_bias are drawn as at the start of a training run.
NamedTensor draw_weight(uint64_t seed, const ParamSpec& s) {
    if (s.init == Init::ones) return draw(seed, s.name, s.shape, 1, 0.2, DType::F32);
    if (s.param == Param::word_embed) return draw(seed, s.name, s.shape, 0, 0.02, DType::F32);
    if (s.init == Init::normal) return draw(seed, s.name, s.shape, 0, 1 / std::sqrt(double(s.shape[1])), DType::F32);
    NamedTensor t{s.name, DType::F32, s.shape, Vec(size_t(s.count))};
    const Philox stream(seed, ("oracle " + s.name).c_str());
    for (int64 i = 0; i < s.count; ++i)
        t.values[size_t(i)] = double(round_bf16(initial_value(s.init, stream, uint64_t(i))));
    return t;
}

const char* const op_names[] = {"ssd",       "attention", "rmsnorm",  "rope",         "linear",
                                "embedding", "swiglu",    "residual", "cross_entropy"};

// The given tensors of a task: names, shapes and drawn values.
std::vector<NamedTensor> draw_given(const OracleTask& task) {
    const Config& c = task.config;
    const int64 B = task.B, T = task.T, D = c.D, H = c.H, P = c.P(), N = c.N, F = c.F, V = c.V;
    const uint64_t seed = task.seed;
    std::vector<NamedTensor> g;
    const auto normal = [&](const char* name, const Shape& shape, double mean = 0, double scale = 1) {
        g.push_back(draw(seed, name, shape, mean, scale));
    };
    const std::string& k = task.kind;
    if (k == "model") {
        const NamedTensor text = draw_ids(seed, "text", {B, T + 1}, V);  // targets are the next tokens
        NamedTensor tokens{"tokens", DType::I64, {B, T}, {}}, targets{"targets", DType::I64, {B, T}, {}};
        for (int64 b = 0; b < B; ++b)
            for (int64 t = 0; t < T; ++t) {
                tokens.values.push_back(text.values[size_t(b * (T + 1) + t)]);
                targets.values.push_back(text.values[size_t(b * (T + 1) + t + 1)]);
            }
        g.push_back(tokens);
        g.push_back(targets);
        for (const ParamSpec& s : ParamTable(c).specs) g.push_back(draw_weight(seed, s));
        // of the scale of the mean loss's own gradients
        for (int64 i = 0; task.state_cotangent && i < c.L; ++i)
            if (!c.is_attention(i))
                normal(format("cotangent.layers.%lld.ssd.final_state", (long long)i).c_str(), {B, H, P, N}, 0,
                       1.0 / double(B * T));
    } else if (k == "ssd") {
        normal("C", {B, T, H, N});
        normal("B", {B, T, H, N});
        normal("X", {B, T, H, P});
        normal("dt_raw", {B, T, H});
        normal("dt_bias", {H}, -3);  // dt about 0.05
        normal("A_log", {H}, 1);
        normal("initial_state", {B, H, P, N});
        normal("cotangent.y", {B, T, H, P});
        normal("cotangent.final_state", {B, H, P, N});
    } else if (k == "attention") {
        normal("q", {B, T, H, P});
        normal("k", {B, T, c.Hkv, P});
        normal("v", {B, T, c.Hkv, P});
        normal("cotangent.y", {B, T, H, P});
    } else if (k == "rmsnorm") {
        normal("x", {B, T, D});
        normal("weight", {D}, 1, 0.2);
        normal("cotangent.y", {B, T, D});
    } else if (k == "rope") {
        normal("x", {B, T, H, P});
        normal("cotangent.y", {B, T, H, P});
    } else if (k == "linear") {
        normal("x", {B, T, D});
        normal("weight", {F, D}, 0, 1 / std::sqrt(double(D)));
        normal("cotangent.y", {B, T, F});
    } else if (k == "embedding") {
        g.push_back(draw_ids(seed, "tokens", {B, T}, V));
        normal("weight", {V, D});
        normal("cotangent.y", {B, T, D});
    } else if (k == "swiglu") {
        normal("gate", {B, T, F}, 0, 2);
        normal("up", {B, T, F});
        normal("cotangent.hidden", {B, T, F});
    } else if (k == "residual") {
        normal("x", {B, T, D});
        normal("m", {B, T, D});
        normal("weight", {D}, 1, 0.2);
        normal("cotangent.y", {B, T, D});
    } else {
        normal("logits", {B, T, V}, 0, 3);
        g.push_back(draw_ids(seed, "targets", {B, T}, V));
        normal("cotangent.losses", {B, T});
    }
    return g;
}

// ---- running it -----------------------------------------------------------------------------------------------------

// How a run computes. jitter 0: as the machine does. Otherwise each tensor is multiplied by 1 + e before it is rounded, for
// another order of sums or another place of rounding: e uniform within 2^-23 in fp32, a unit of the last place; within 2^-8
// in bf16, half a unit.
struct Arithmetic {
    bool bf16 = false;
    uint64_t jitter = 0;
};

// In a bf16 engine these stay fp32 (transxssm.cu; docs/model.md): their errors would add up along the sequence.
bool stays_fp32(const std::string& name) {
    const std::string last = name.substr(name.rfind('.') + 1);
    for (const char* s : {"dt", "dA", "cs", "state_in", "state_out", "final_state", "lse", "losses", "rstd"})
        if (last == s) return true;
    return false;
}

// Notes tensors in their order, and rounds them as the arithmetic says.
template <class T>
class Recorder : public Probe<T> {
  public:
    std::vector<NamedTensor> tensors;
    bool recording = true, everything = true;    // everything false: only logits and losses
    std::map<int64, std::vector<T>> cotangents;  // by layer

    explicit Recorder(const Arithmetic& a) : arithmetic(a) {}

    void see(const std::string& name, T* data, const Shape& shape, int64 ld) override {
        int64 rows = 1, width = 1;
        for (size_t i = 0; i < shape.size(); ++i) (i < 2 ? rows : width) *= shape[i];
        const bool bf16 = arithmetic.bf16 && !stays_fp32(name);
        const Philox stream(arithmetic.jitter, name.c_str());
        const T unit = T(bf16 ? 1.0 / 256 : 1.0 / 8388608) / T(2147483648.0);
#pragma omp parallel for schedule(static) if (rows * width > kParallelMin)
        for (int64 r = 0; r < rows; ++r) {
            if (!arithmetic.jitter && !bf16) continue;
            T* x = data + r * ld;
            for (int64 j = 0; j < width; j += 4) {
                const Philox::Block random = arithmetic.jitter ? stream.at(uint64_t(r * width + j)) : Philox::Block{};
                for (int64 k = j; k < std::min(j + 4, width); ++k) {
                    if (arithmetic.jitter) x[k] *= T(1) + unit * T(int32_t(random.word[k - j]));
                    if (bf16) x[k] = T(round_bf16(float(x[k])));
                }
            }
        }
        if (!recording || !(everything || name == "logits" || name == "losses")) return;
        NamedTensor t{name, DType::F64, shape, Vec()};
        t.values.reserve(size_t(rows * width));
        for (int64 r = 0; r < rows; ++r)
            for (int64 j = 0; j < width; ++j) t.values.push_back(double(data[r * ld + j]));
        tensors.push_back(std::move(t));
    }
    const T* final_state_cotangent(int64 layer) const override {
        const auto found = cotangents.find(layer);
        return found == cotangents.end() ? nullptr : found->second.data();
    }
    template <class U>
    void note(const std::string& name, const std::vector<U>& v, const Shape& shape, DType dtype = DType::F64) {
        tensors.push_back({name, dtype, shape, Vec(v.begin(), v.end())});
    }

  private:
    const Arithmetic arithmetic;
};

// In the run's own arithmetic, as an engine of that precision would.
template <class T>
double norm_of(const T* v, int64 n) {
    return double(std::sqrt(dot(v, v, n)));
}

// The cached decoder: S tokens at once, then one by one.
template <class T>
void run_decode(const OracleTask& task, Model<T>& m, Recorder<T>& out, const std::vector<int32_t>& tokens) {
    const Config& c = task.config;
    const int64 B = task.B;
    for (const int64 split : std::set<int64>{1, c.Q - 1, c.Q, c.Q + 1}) {
        if (split < 1 || split >= task.T) continue;
        const int64 end = std::min(split + 4, task.T);
        ModelState<T> state(c, B, end);
        while (state.position < end) {
            const int64 from = state.position, n = from == 0 ? split : 1;
            std::vector<int32_t> next;
            for (int64 b = 0; b < B; ++b)
                next.insert(next.end(), tokens.begin() + b * task.T + from, tokens.begin() + b * task.T + from + n);
            m.forward(next.data(), nullptr, B, n, nullptr, &state, false);
            const std::string at = format("decode.split_%lld.after_%lld.", (long long)split, (long long)(from + n));
            out.note(at + "position", std::vector<int64>{state.position}, {}, DType::I64);
            for (int64 i = 0; i < c.L; ++i) {
                const auto& layer = state.layers[size_t(i)];
                const std::string name = at + format("layers.%lld.", (long long)i);
                const int64 row = c.Hkv * c.P();
                if (!c.is_attention(i)) out.note(name + "ssm_state", layer.S, {B, c.H, c.P(), c.N});
                for (const auto* cache : {&layer.k, &layer.v}) {
                    if (!c.is_attention(i)) break;
                    std::vector<T> used;
                    for (int64 b = 0; b < B; ++b)
                        used.insert(used.end(), cache->begin() + b * end * row,
                                    cache->begin() + (b * end + state.position) * row);
                    out.note(name + (cache == &layer.k ? "k" : "v"), used, {B, state.position, c.Hkv, c.P()});
                }
                std::vector<T> y;  // of the last token
                for (int64 b = 0; b < B; ++b) {
                    const auto row_end = m.layers[size_t(i)].y.begin() + (b + 1) * n * c.D;
                    y.insert(y.end(), row_end - c.D, row_end);
                }
                out.note(name + "y", y, {B, c.H, c.P()});
            }
            out.note(at + "logits", m.logits, {B, c.V});
        }
    }
}

template <class T>
void run_adamw(const OracleTask& task, Model<T>& m, Recorder<T>& out, const std::vector<int32_t>& tokens,
               const std::vector<int32_t>& targets, const Arithmetic& arithmetic) {
    const int64 steps = task.adamw_steps;
    std::vector<T> master = m.weights, exp_avg(master.size()), exp_avg_sq(master.size());
    Vec losses, norms;
    std::vector<Vec> param_norms(m.table.specs.size());
    for (int64 step = 1; step <= steps; ++step) {
        for (size_t i = 0; i < master.size(); ++i)
            m.weights[i] = arithmetic.bf16 ? T(round_bf16(float(master[i]))) : master[i];
        std::fill(m.gradients.begin(), m.gradients.end(), T(0));
        losses.push_back(m.forward(tokens.data(), targets.data(), task.B, task.T, nullptr, nullptr));
        m.backward(1);
        norms.push_back(norm_of(m.gradients.data(), m.table.count));
        const double scale = task.clip > 0 && norms.back() > task.clip ? task.clip / norms.back() : 1;
        for (size_t k = 0; k < param_norms.size(); ++k) {
            const ParamSpec& s = m.table.specs[k];
            adamw_update(&master[size_t(s.offset)], &exp_avg[size_t(s.offset)], &exp_avg_sq[size_t(s.offset)],
                         &m.gradients[size_t(s.offset)], task.adamw, s.decay, task.lr, step, scale, s.count);
            param_norms[k].push_back(norm_of(&master[size_t(s.offset)], s.count));
        }
    }
    out.note("adamw.loss", losses, {steps});
    out.note("adamw.grad_norm", norms, {steps});
    for (size_t k = 0; k < param_norms.size(); ++k)
        out.note("adamw.param_norm." + m.table.specs[k].name, param_norms[k], {steps});
}

// Twelve choices among random logits, with ties. The logits are given, but computed here from the seed alone.
void run_sampler(const OracleTask& task, std::vector<NamedTensor>* out) {
    const double settings[][4] = {{0, 0, 1, 0},   {1, 0, 1, 0},     {0.7, 0, 1, 0},     {1.5, 0, 1, 0},
                                  {1, 1, 1, 0},   {1, 5, 1, 0},     {1, 0, 0.5, 0},     {1, 0, 0.95, 0},
                                  {1, 0, 1, 0.2}, {0.8, 8, 0.9, 0}, {0.8, 8, 0.9, 0.1}, {2, 3, 0.999, 0.01}};
    const int64 n = 12, V = task.config.V;
    NamedTensor logits = draw(task.seed, "sampler.logits", {n, V}, 0, 2, DType::F32);
    NamedTensor uniform{"sampler.uniform", DType::F64, {n}, {}}, chosen{"sampler.token", DType::I64, {n}, {}};
    NamedTensor given{"sampler.settings", DType::F64, {n, 4}, {}};
    for (int64 i = 0; i < n; ++i) {
        Sampler s;
        s.temperature = settings[i][0];
        s.top_k = int64(settings[i][1]);
        s.top_p = settings[i][2];
        s.min_p = settings[i][3];
        s.seed = task.seed;
        const std::vector<float> row(logits.values.begin() + i * V, logits.values.begin() + (i + 1) * V);
        given.values.insert(given.values.end(), settings[i], settings[i] + 4);
        uniform.values.push_back(Philox(s.seed, "sample").uniform_at(uint64_t(i)));
        chosen.values.push_back(s.choose(row.data(), V, uint64_t(i)));
    }
    for (NamedTensor* t : {&logits, &uniform, &given, &chosen}) out->push_back(std::move(*t));
}

template <class T>
std::vector<NamedTensor> run_model(const OracleTask& task, const Arithmetic& arithmetic) {
    const Config& c = task.config;
    Recorder<T> out(arithmetic);
    out.everything = task.intermediates;
    Model<T> m(c);
    m.probe = &out;
    for (const ParamSpec& s : m.table.specs) {
        const Vec& w = task.at(s.name);
        for (int64 i = 0; i < s.count; ++i) {
            const float x = float(w[size_t(i)]);
            m.weights[size_t(s.offset + i)] = T(arithmetic.bf16 ? round_bf16(x) : x);
        }
    }
    for (int64 i = 0; i < c.L; ++i)
        if (const NamedTensor* g = find(task.given, format("cotangent.layers.%lld.ssd.final_state", (long long)i)))
            out.cotangents[i].assign(g->values.begin(), g->values.end());
    const std::vector<int32_t> tokens = task.ids("tokens"), targets = task.ids("targets");

    const double loss = m.forward(tokens.data(), targets.data(), task.B, task.T, nullptr, nullptr);
    double objective = loss;
    for (const auto& g : out.cotangents)
        for (size_t k = 0; k < g.second.size(); ++k)
            objective += double(g.second[k]) * double(m.layers[size_t(g.first)].final_state[k]);
    out.note("loss", Vec{loss}, {});
    out.note("objective", Vec{objective}, {});
    m.backward(1);
    for (size_t k = m.table.specs.size(); k-- > 0;) {
        const ParamSpec& s = m.table.specs[k];
        const auto from = m.gradients.begin() + s.offset;
        out.note("grad." + s.name, std::vector<T>(from, from + s.count), s.shape);
    }
    out.recording = false;
    out.cotangents.clear();
    if (task.decode) run_decode(task, m, out, tokens);
    if (task.adamw_steps > 0) run_adamw(task, m, out, tokens, targets, arithmetic);
    run_sampler(task, &out.tensors);
    return std::move(out.tensors);
}

// One op: inputs -> outputs -> gradients, each shown to the recorder.
template <class T>
std::vector<NamedTensor> run_op(const OracleTask& task, const Arithmetic& arithmetic) {
    const Config& c = task.config;
    const int64 B = task.B, T_ = task.T, rows = B * T_, D = c.D, H = c.H, P = c.P(), N = c.N, F = c.F, V = c.V;
    Recorder<T> out(arithmetic);
    const auto in = [&](const char* name) {
        const Vec& v = task.at(name);
        std::vector<T> x(v.begin(), v.end());
        for (size_t i = 0; arithmetic.bf16 && i < x.size(); ++i) x[i] = T(round_bf16(float(x[i])));
        return x;
    };
    const auto see = [&](const char* name, std::vector<T>& v, const Shape& shape, int64 ld = 0) {
        int64 width = 1;
        for (size_t i = 2; i < shape.size(); ++i) width *= shape[i];
        out.see(name, v.data(), shape, ld ? ld : width);
    };
    const auto zeros = [](int64 n) { return std::vector<T>(size_t(n), T(0)); };
    const std::string& k = task.kind;
    if (k == "ssd") {
        const SsdShape n{B, T_, H, P, N, c.Q, H * std::max(N, P)};  // C, B, X apart, in rows of one length
        const int64 NC = c.chunks(T_);
        const auto spread = [&](const std::vector<T>& v, int64 width) {
            std::vector<T> s = zeros(rows * n.ld);
            for (int64 r = 0; r < rows; ++r) std::copy_n(v.data() + r * width, width, s.data() + r * n.ld);
            return s;
        };
        std::vector<T> sc = spread(in("C"), H * N), sb = spread(in("B"), H * N), sx = spread(in("X"), H * P);
        std::vector<T> dt_raw = in("dt_raw"), dt_bias = in("dt_bias"), A_log = in("A_log"), S_0 = in("initial_state");
        std::vector<T> dt = zeros(rows * H), dA = dt, cs = dt, states = zeros(B * H * NC * P * N), S_T = S_0;
        std::vector<T> y = zeros(rows * H * P), dy = in("cotangent.y"), dS_T = in("cotangent.final_state");
        ssd_dt_forward(dt.data(), dA.data(), dt_raw.data(), dt_bias.data(), A_log.data(), c.ssd_decay, rows, H, H);
        see("dt", dt, {B, T_, H});
        see("dA", dA, {B, T_, H});
        chunk_cumsums(cs, dA, B, T_, H, c.Q);
        see("cs", cs, {B, T_, H});
        ssd_chunked_forward(y.data(), S_T.data(), states.data(), sc.data(), sb.data(), sx.data(), dt.data(), dA.data(),
                            S_0.data(), n);
        see("state_in", states, {B, H, NC, P, N});
        std::vector<T> after = states_out(states, S_T.data(), B * H, NC, P * N);
        see("state_out", after, {B, H, NC, P, N});
        see("final_state", S_T, {B, H, P, N});
        see("y", y, {B, T_, H, P});
        std::vector<T> dsc = zeros(rows * n.ld), dsb = dsc, dsx = dsc, ddt = zeros(rows * H), ddA = ddt, draw_ = ddt;
        std::vector<T> dS_0 = zeros(B * H * P * N), dbias = zeros(H), dlog = zeros(H);
        ssd_chunked_backward<T>(dsc.data(), dsb.data(), dsx.data(), ddt.data(), ddA.data(), dS_0.data(), nullptr,
                                dy.data(), dS_T.data(), sc.data(), sb.data(), sx.data(), dt.data(), dA.data(),
                                states.data(), n);
        ssd_dt_backward(draw_.data(), dbias.data(), dlog.data(), ddt.data(), ddA.data(), dt_raw.data(), dt_bias.data(),
                        A_log.data(), dA.data(), c.ssd_decay, rows, H, H);
        for (int64 i = 0; c.ssd_decay && i < rows * H; ++i)
            ddt[size_t(i)] -= std::exp(A_log[size_t(i % H)]) * ddA[size_t(i)];
        see("grad.C", dsc, {B, T_, H, N}, n.ld);
        see("grad.B", dsb, {B, T_, H, N}, n.ld);
        see("grad.X", dsx, {B, T_, H, P}, n.ld);
        see("grad.dA", ddA, {B, T_, H});
        see("grad.dt", ddt, {B, T_, H});
        see("grad.dt_raw", draw_, {B, T_, H});
        out.note("grad.dt_bias", dbias, {H});
        out.note("grad.A_log", dlog, {H});
        out.note("grad.initial_state", dS_0, {B, H, P, N});
    } else if (k == "attention") {
        const AttentionShape n{B, T_, T_, H, c.Hkv, P, H * P, c.Hkv * P, T_ * c.Hkv * P};
        std::vector<T> q = in("q"), key = in("k"), v = in("v"), y = zeros(rows * H * P), lse = zeros(rows * H);
        std::vector<T> dy = in("cotangent.y"), dq = q, dk = key, dv = v;
        attention_forward(y.data(), lse.data(), q.data(), key.data(), v.data(), n);
        see("lse", lse, {B, T_, H});
        see("y", y, {B, T_, H, P});
        attention_backward(dq.data(), dk.data(), dv.data(), dy.data(), q.data(), key.data(), v.data(), y.data(),
                           lse.data(), n);
        see("grad.q", dq, {B, T_, H, P});
        see("grad.k", dk, {B, T_, c.Hkv, P});
        see("grad.v", dv, {B, T_, c.Hkv, P});
    } else if (k == "rmsnorm") {
        std::vector<T> x = in("x"), w = in("weight"), dy = in("cotangent.y"), y = zeros(rows * D), rstd = zeros(rows);
        std::vector<T> dx = zeros(rows * D), dw = zeros(D);
        rmsnorm_forward(y.data(), rstd.data(), x.data(), w.data(), c.norm_eps, rows, D);
        see("rstd", rstd, {B, T_});
        see("y", y, {B, T_, D});
        rmsnorm_backward(dx.data(), dw.data(), dy.data(), x.data(), w.data(), rstd.data(), rows, D);
        see("grad.x", dx, {B, T_, D});
        out.note("grad.weight", dw, {D});
    } else if (k == "rope") {
        std::vector<T> y = in("x"), dx = in("cotangent.y");
        RopeTable<T> table;
        table.extend(P, c.rope_theta, T_);
        rope(y.data(), table, B, T_, H, H * P, 0, false);
        see("y", y, {B, T_, H, P});
        rope(dx.data(), table, B, T_, H, H * P, 0, true);
        see("grad.x", dx, {B, T_, H, P});
    } else if (k == "linear") {
        std::vector<T> x = in("x"), w = in("weight"), dy = in("cotangent.y"), y = zeros(rows * F), dx = x;
        std::vector<T> dw = zeros(F * D);
        linear_forward(y.data(), x.data(), w.data(), rows, D, F);
        see("y", y, {B, T_, F});
        linear_backward(dx.data(), dw.data(), dy.data(), x.data(), w.data(), rows, D, F, false);
        see("grad.x", dx, {B, T_, D});
        out.note("grad.weight", dw, {F, D});
    } else if (k == "embedding") {
        const std::vector<int32_t> tokens = task.ids("tokens");
        std::vector<T> w = in("weight"), dy = in("cotangent.y"), y = zeros(rows * D), dw = zeros(V * D);
        embedding_forward(y.data(), tokens.data(), w.data(), rows, D);
        see("y", y, {B, T_, D});
        embedding_backward(dw.data(), dy.data(), tokens.data(), rows, D);
        out.note("grad.weight", dw, {V, D});
    } else if (k == "swiglu") {
        const std::vector<T> gate = in("gate"), up = in("up");
        std::vector<T> both = zeros(rows * 2 * F), dboth = both, h = zeros(rows * F), dh = in("cotangent.hidden");
        for (int64 r = 0; r < rows; ++r) {
            std::copy_n(gate.data() + r * F, F, both.data() + r * 2 * F);
            std::copy_n(up.data() + r * F, F, both.data() + r * 2 * F + F);
        }
        swiglu_forward(h.data(), both.data(), rows, F);
        see("hidden", h, {B, T_, F});
        swiglu_backward(dboth.data(), dh.data(), both.data(), rows, F);
        see("grad.gate", dboth, {B, T_, F}, 2 * F);
        out.see("grad.up", dboth.data() + F, {B, T_, F}, 2 * F);
    } else if (k == "residual") {
        std::vector<T> x = in("x"), m = in("m"), w = in("weight"), dy = in("cotangent.y"), y = x, dx = x, dm = x;
        std::vector<T> dw = zeros(D);
        residual_forward(y.data(), x.data(), m.data(), w.data(), Dropout{}, rows, D);
        see("y", y, {B, T_, D});
        residual_backward(dx.data(), dm.data(), dw.data(), dy.data(), x.data(), w.data(), Dropout{}, rows, D);
        see("grad.x", dx, {B, T_, D});
        see("grad.m", dm, {B, T_, D});
        out.note("grad.weight", dw, {D});
    } else {
        const std::vector<int32_t> targets = task.ids("targets");
        std::vector<T> logits = in("logits"), dloss = in("cotangent.losses"), losses = zeros(rows);
        cross_entropy_forward(losses.data(), logits.data(), targets.data(), rows, V);
        see("losses", losses, {B, T_});
        for (int64 r = 0; r < rows; ++r)  // a scale of its own for each row
            cross_entropy_backward(&logits[size_t(r * V)], &losses[size_t(r)], &targets[size_t(r)],
                                   double(dloss[size_t(r)]), 1, V);
        see("grad.logits", logits, {B, T_, V});
    }
    return std::move(out.tensors);
}

std::vector<NamedTensor> run(const OracleTask& task, const std::string& precision, uint64_t jitter = 0) {
    const Arithmetic a{precision == "bf16", jitter};
    if (task.kind == "model") return precision == "fp64" ? run_model<double>(task, a) : run_model<float>(task, a);
    return precision == "fp64" ? run_op<double>(task, a) : run_op<float>(task, a);
}

// ---- errors and tolerances ------------------------------------------------------------------------------------------

struct TensorError {
    double relative = 0,
           max_abs = 0;  // root mean square of the difference over that of the reference; NaN if either has one
    int64 worst = 0;     // element of max_abs
    bool finite = true;  // the candidate's numbers, as the reference's always are
};
TensorError error_between(const Vec& candidate, const Vec& reference) {
    TensorError e;
    double difference = 0, size = 0;
    for (size_t i = 0; i < reference.size(); ++i) {
        const double d = std::fabs(candidate[i] - reference[i]);
        if (!std::isfinite(candidate[i])) {
            if (e.finite) e.worst = int64(i);
            e.finite = false;
        } else if (e.finite && d > e.max_abs) {
            e.max_abs = d;
            e.worst = int64(i);
        }
        difference += d * d;
        size += reference[i] * reference[i];
    }
    e.relative = size == 0 ? 0 : std::sqrt(difference / size);  // beside a tensor of zeros max_abs alone speaks
    if (!e.finite) e.relative = e.max_abs = NAN;
    return e;
}

// The measured rounding noise of this program in less precision, the greatest of so many runs.
constexpr int kNoiseRuns = 4;
struct Noise {
    double relative[2] = {0, 0}, max_abs[2] = {0, 0};  // fp32, bf16
    size_t order = 0;                                  // of computation
};

// Whether this program computed a tensor; else it was given, or drawn for the sampler's cases.
bool is_computed(const std::string& name) { return !starts_with(name, "sampler.") || name == "sampler.token"; }

std::map<std::string, Noise> measure_noise(const OracleTask& task, const std::vector<NamedTensor>& exact) {
    std::map<std::string, Noise> noise;  // of integers: 0
    for (size_t i = 0; i < exact.size(); ++i)
        if (is_computed(exact[i].name)) noise[exact[i].name].order = i;
    for (int which = 0; which < 2; ++which)
        for (int r = 0; r < kNoiseRuns; ++r) {
            const std::vector<NamedTensor> rounded = run(task, which ? "bf16" : "fp32", uint64_t(r));
            for (size_t i = 0; i < exact.size(); ++i) {
                if (exact[i].dtype != DType::F64 || !is_computed(exact[i].name)) continue;
                const TensorError e = error_between(rounded[i].values, exact[i].values);
                if (!e.finite) fail("%s is not finite in %s", exact[i].name.c_str(), which ? "bf16" : "fp32");
                Noise& n = noise[exact[i].name];
                n.relative[which] = std::max(n.relative[which], e.relative);
                n.max_abs[which] = std::max(n.max_abs[which], e.max_abs);
            }
        }
    return noise;
}

// ---- the file -------------------------------------------------------------------------------------------------------

const char* const oracle_schema = "transxssm-oracle-1";

Json op_dimensions(const OracleTask& t) {
    const Config& c = t.config;
    Json j = Json::object();
    j.keys = {{"B", t.B},
              {"T", t.T},
              {"D", c.D},
              {"H", c.H},
              {"Hkv", c.Hkv},
              {"P", c.P()},
              {"N", c.N},
              {"Q", c.Q},
              {"F", c.F},
              {"V", c.V},
              {"rope_theta", c.rope_theta},
              {"norm_eps", c.norm_eps},
              {"ssd_decay", c.ssd_decay}};
    return j;
}

// The bytes of a tensor in its file.
std::string file_bytes(const NamedTensor& t) {
    std::string out;
    const auto put = [&](auto v) { out.append(reinterpret_cast<const char*>(&v), sizeof v); };
    out.reserve(t.values.size() * size_t(dtype_size(t.dtype)));
    for (const double v : t.values) {
        if (t.dtype == DType::F64) put(v);
        else if (t.dtype == DType::F32) put(float(v));
        else put(int64(v));
    }
    return out;
}

std::string given_sha256(const std::vector<NamedTensor>& given) {
    Sha256 sha;
    for (const NamedTensor& t : given) {
        const std::string bytes = file_bytes(t);
        sha.add(bytes.data(), bytes.size());
    }
    return sha.hex();
}

void write_oracle(const std::string& path, const OracleTask& task, const std::string& precision,
                  const std::vector<NamedTensor>& computed, const std::map<std::string, Noise>& noise) {
    Json adamw = Json::object(), noise_json = Json::object();
    adamw.keys = {{"steps", task.adamw_steps}, {"lr", task.lr},         {"beta1", task.adamw.beta1},
                  {"beta2", task.adamw.beta2}, {"eps", task.adamw.eps}, {"weight_decay", task.adamw.weight_decay},
                  {"clip", task.clip}};
    for (const NamedTensor& t : computed) {  // in this order, which other programs' writers change in the file
        const auto n = noise.find(t.name);
        if (n == noise.end()) continue;
        Json four = Json::array();
        for (int which = 0; which < 2; ++which)
            for (const double v : {n->second.relative[which], n->second.max_abs[which]})
                four.items.emplace_back(std::stod(format("%.3g", v)));
        noise_json.keys.emplace_back(t.name, four);
    }
    const bool model = task.kind == "model";
    std::string objective = "sum over the outputs with a cotangent of <cotangent, output>";
    if (model && task.state_cotangent) objective = "loss + sum over SSD layers of <cotangent, final_state>";
    else if (model) objective = "loss";
    std::vector<std::pair<std::string, std::string>> metadata = {
        {"schema", oracle_schema},
        {"kind", task.kind},
        {"config", (model ? task.config.to_json() : op_dimensions(task)).dump(0)},
        {"seed", std::to_string(task.seed)},
        {"rope_pairing", "half-split"},
        {"chunk_length", std::to_string(task.config.Q)},
        {"precision", precision},
        {"objective", objective},
        {"inputs_sha256", given_sha256(task.given)}};
    if (model) metadata.emplace_back("adamw", adamw.dump(0));
    if (precision == "fp64") metadata.emplace_back("noise", noise_json.dump(0));
    std::vector<TensorView> views;
    std::vector<std::string> bytes;  // of what is not F64
    for (const auto* list : {&task.given, &computed})
        for (const NamedTensor& t : *list) {
            if (t.dtype != DType::F64) bytes.push_back(file_bytes(t));
            views.push_back({t.name, t.dtype, t.shape, t.values.data()});
        }
    size_t next = 0;
    for (TensorView& v : views)
        if (v.dtype != DType::F64) v.data = bytes[next++].data();
    write_safetensors(path, views, metadata);
}

const std::string& metadata_of(const SafeTensors& file, const char* key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end())
        fail("%s: header: __metadata__.%s is missing: not an oracle file", file.path.c_str(), key);
    return found->second;
}

// The task that a file of ours was made from, without its given tensors.
OracleTask task_of(const SafeTensors& file) {
    const std::string at = file.path + ": __metadata__.";
    if (metadata_of(file, "schema") != oracle_schema)
        fail("%sschema is '%s', expected '%s'", at.c_str(), metadata_of(file, "schema").c_str(), oracle_schema);
    OracleTask task;
    task.kind = metadata_of(file, "kind");
    const Json config = Json::parse(metadata_of(file, "config"), at + "config");
    if (!parse_uint(metadata_of(file, "seed"), &task.seed))
        fail("%sseed is '%s', expected a non-negative integer", at.c_str(), metadata_of(file, "seed").c_str());
    if (task.kind != "model") {
        bool known = false;
        for (const char* op : op_names) known = known || task.kind == op;
        if (!known) fail("%skind is '%s', which is no op", at.c_str(), task.kind.c_str());
        Config& c = task.config;
        int64 P = 0;
        const std::pair<const char*, int64*> sizes[] = {{"B", &task.B},  {"T", &task.T}, {"D", &c.D}, {"H", &c.H},
                                                        {"Hkv", &c.Hkv}, {"P", &P},      {"N", &c.N}, {"Q", &c.Q},
                                                        {"F", &c.F},     {"V", &c.V}};
        for (const auto& s : sizes) {
            const Json* j = config.find(s.first);
            if (!j || !j->integer(s.second) || *s.second < 1 || *s.second > INT32_MAX)
                fail("%sconfig: %s is missing or not a size", at.c_str(), s.first);
        }
        const std::pair<const char*, double*> numbers[] = {{"rope_theta", &c.rope_theta}, {"norm_eps", &c.norm_eps}};
        for (const auto& n : numbers) {
            const Json* j = config.find(n.first);
            if (!j || j->type != Json::Number) fail("%sconfig: %s is missing or not a number", at.c_str(), n.first);
            *n.second = j->number;
        }
        const Json* decay = config.find("ssd_decay");
        if (!decay || decay->type != Json::Bool)
            fail("%sconfig: ssd_decay is missing or not a truth value", at.c_str());
        c.ssd_decay = decay->boolean;
        c.validate(at + "config");
        return task;
    }
    task.config = Config::from_json(config, at + "config");
    const SafeTensors::Entry* tokens = file.find("tokens");
    if (!tokens || tokens->shape.size() != 2) fail("%s: tensor 'tokens' (B,T) is missing", file.path.c_str());
    task.B = tokens->shape[0];
    task.T = tokens->shape[1];
    task.state_cotangent = task.intermediates = task.decode = false;
    for (const SafeTensors::Entry& e : file.entries) {
        task.state_cotangent = task.state_cotangent || starts_with(e.name, "cotangent.");
        task.intermediates = task.intermediates || e.name == "embedding";
        task.decode = task.decode || starts_with(e.name, "decode.");
    }
    const Json adamw = Json::parse(metadata_of(file, "adamw"), at + "adamw");
    const Json* steps = adamw.find("steps");
    if (!steps || !steps->integer(&task.adamw_steps) || task.adamw_steps < 0 || task.adamw_steps > 100000)
        fail("%sadamw: steps is missing or not a count", at.c_str());
    const std::pair<const char*, double*> numbers[] = {{"lr", &task.lr},
                                                       {"beta1", &task.adamw.beta1},
                                                       {"beta2", &task.adamw.beta2},
                                                       {"eps", &task.adamw.eps},
                                                       {"weight_decay", &task.adamw.weight_decay},
                                                       {"clip", &task.clip}};
    for (const auto& n : numbers) {
        const Json* j = adamw.find(n.first);
        if (!j || j->type != Json::Number) fail("%sadamw: %s is missing or not a number", at.c_str(), n.first);
        *n.second = j->number;
    }
    return task;
}

void read_values(const SafeTensors& file, const SafeTensors::Entry& e, Vec* values, bool must_be_finite) {
    values->resize(size_t(element_count(e.shape)));
    if (e.dtype == DType::I64 || e.dtype == DType::I32) file.read_integers(e, values->data());
    else file.read(e, values->data(), must_be_finite);
}

// Puts the file's tensors in the place of drawn ones of the same names. A file that is no oracle may hold no others.
void take_given(const SafeTensors& file, OracleTask* task) {
    std::vector<std::string> names;
    for (const NamedTensor& t : task->given) names.push_back(t.name);
    for (const SafeTensors::Entry& e : file.entries)
        if (!file.metadata.count("schema") && !find(task->given, e.name))
            fail("%s: tensor '%s' is not an input of %s; did you mean '%s'?", file.path.c_str(), e.name.c_str(),
                 task->kind == "model" ? "this model" : task->kind.c_str(), nearest_word(e.name, names).c_str());
    for (NamedTensor& t : task->given) {
        const SafeTensors::Entry* e = file.find(t.name);
        if (!e) continue;
        if (e->shape != t.shape)
            fail("%s: tensor '%s' has shape %s, expected %s", file.path.c_str(), t.name.c_str(),
                 to_text(e->shape).c_str(), to_text(t.shape).c_str());
        const bool integer = e->dtype == DType::I64 || e->dtype == DType::I32;
        if (integer != (t.dtype == DType::I64))
            fail("%s: tensor '%s' is %s, expected %s", file.path.c_str(), t.name.c_str(), dtype_name(e->dtype),
                 t.dtype == DType::I64 ? "I64" : "floating-point numbers");
        read_values(file, *e, &t.values, true);
    }
}

// Ids from a text file: one sequence a line, of T+1 ids each; targets are the next tokens.
void read_ids(const std::string& path, Vec* text, int64* B, int64* T) {
    const std::string s = read_input(path);
    *B = *T = 0;
    for (size_t at = 0; at < s.size();) {
        const size_t end = std::min(s.find('\n', at), s.size());
        int64 count = 0;
        for (size_t i = at; i < end;) {
            const size_t from = std::min(s.find_first_not_of(" \t\r", i), end),
                         to = std::min(s.find_first_of(" \t\r", from), end);
            int64 id = 0;
            if (from < to && (!parse_int(s.substr(from, to - from), &id) || id < 0 || id > INT32_MAX))
                fail("%s: sequence %lld: '%s' is not a token id", path.c_str(), (long long)*B,
                     s.substr(from, std::min<size_t>(to - from, 40)).c_str());
            if (from < to) text->push_back(double(id));
            count += from < to;
            i = to;
        }
        at = end + 1;
        if (count == 0) continue;
        if (*B > 0 && count != *T + 1)
            fail("%s: sequence %lld has %lld ids, the first has %lld: all must be equally long", path.c_str(),
                 (long long)*B, (long long)count, (long long)(*T + 1));
        *T = count - 1;
        ++*B;
    }
    if (*B == 0 || *T < 1) fail("%s: expected lines of at least 2 token ids", path.c_str());
}

int oracle_command(int argc, char** argv) {
    OracleTask task;
    std::string preset_name = "tiny", op, weights, tokens_file, inputs, precision = "fp64", out;
    int64 P = 0;
    const auto add_all = [&](Options* o) {
        o->section("What");
        o->add("op", &op,
               "one op alone: ssd, attention, rmsnorm, rope, linear, embedding, swiglu, residual or cross_entropy");
        o->add("preset", &preset_name, "the model; the options below change it");
        add_model_options(o, &task.config);
        o->add("vocab", &task.config.V, "vocabulary", 1, INT32_MAX);
        o->add("head-dim", &P, "of an op; 0: d-model / heads", 0, INT32_MAX);
        o->add("batch", &task.B, "sequences", 1, 1 << 24);
        o->add("seq-len", &task.T, "tokens of a sequence; 0: the preset's", 0, 1 << 24);
        o->add("seed", &task.seed, "of weights, tokens and inputs");
        o->section("In place of drawn numbers");
        o->add("weights", &weights, "DIR: a model's configuration and weights");
        o->add("tokens", &tokens_file, "text file of token ids, one sequence of T+1 a line; - is standard input");
        o->add("inputs", &inputs,
               "safetensors file of given tensors by name; an oracle file also says what to compute");
        o->section("How much");
        o->add("state-cotangent", &task.state_cotangent, "the objective also reads the final states");
        o->add("intermediates", &task.intermediates, "false: no activations and their gradients but logits and losses");
        o->add("decode", &task.decode, "the cached decoder's states and logits");
        o->add("adamw-steps", &task.adamw_steps, "optimizer steps", 0, 1000);
        o->add("precision", &precision, "fp64: an oracle; fp32 or bf16: the same by this program in less, a candidate");
        o->section("Output");
        o->add("out", &out, "FILE.safetensors");
    };
    const char* usage =
        "ref_cpu oracle [options] --out FILE.safetensors\n\nWrites every number of a forward and backward pass, in double, "
        "for other implementations to be\ncompared with (docs/oracle.md).";
    {  // the preset, an op or a model's directory set the defaults of the other options: they are looked for first
        Options first("ref_cpu", usage);
        add_all(&first);
        if (!first.parse(argc, argv, 1)) return 0;
    }
    const std::string given_preset = preset_name, given_weights = weights;
    task = OracleTask();
    task.config = preset(given_preset);
    if (!given_weights.empty()) task.config = load_config(resolve_checkpoint(given_weights));
    Options options("ref_cpu", usage);
    add_all(&options);
    options.parse(argc, argv, 1);
    const auto together = [&](const char* a, const char* b) {
        if (options.given(a) && options.given(b)) usage_error("--%s and --%s cannot be given together", a, b);
    };
    if (out.empty()) usage_error("oracle: --out is missing");
    if (precision != "fp64" && precision != "fp32" && precision != "bf16")
        usage_error("--precision: '%s' is not fp64, fp32 or bf16", precision.c_str());
    together("op", "weights");
    together("op", "tokens");
    together("preset", "weights");
    together("tokens", "batch");  // the file says how many sequences, and how long
    together("tokens", "seq-len");
    const std::string model = weights.empty() ? "" : resolve_checkpoint(weights) + "/model.safetensors";
    for (const std::string& in : {inputs, tokens_file, model})
        if (!in.empty() && same_file(in, out)) usage_error("--out: %s is read from: give another name", out.c_str());
    if (is_directory(out) || access(parent_directory(out).c_str(), W_OK) != 0)  // now, not after the work
        fail("%s: cannot write: %s", out.c_str(), is_directory(out) ? strerror(EISDIR) : strerror(errno));
    if (options.given("heads") && !options.given("kv-heads")) task.config.Hkv = task.config.H;

    std::unique_ptr<SafeTensors> file;
    if (!inputs.empty()) file = std::make_unique<SafeTensors>(inputs);
    if (file && file->metadata.count("schema")) {
        for (const std::string& name : options.given_names())
            if (name != "inputs" && name != "out" && name != "precision")
                usage_error("--%s: %s is an oracle file, which says what to compute", name.c_str(), inputs.c_str());
        task = task_of(*file);
    } else {
        if (!op.empty()) {
            const std::vector<std::string> ops(std::begin(op_names), std::end(op_names));
            if (std::find(ops.begin(), ops.end(), op) == ops.end())
                usage_error("--op: '%s' is no op; did you mean '%s'?", op.c_str(), nearest_word(op, ops).c_str());
            task.kind = op;
        }
        if (P > 0) {
            if (op.empty()) usage_error("--head-dim is for one op; a model's is --d-model / --heads");
            task.config.D = P * task.config.H;
        }
        task.config.validate();
        if (task.T == 0) task.T = task.config.T;
        task.config.dropout = 0;
    }
    Vec text;
    if (!tokens_file.empty()) read_ids(tokens_file, &text, &task.B, &task.T);
    task.given = draw_given(task);
    if (!weights.empty()) {
        const std::vector<float> w = load_weights(resolve_checkpoint(weights), task.config);
        for (const ParamSpec& s : ParamTable(task.config).specs)
            for (NamedTensor& t : task.given)
                if (t.name == s.name) t.values.assign(w.begin() + s.offset, w.begin() + s.offset + s.count);
    }
    if (!text.empty())
        for (NamedTensor& t : task.given)
            for (size_t i = 0; (t.name == "tokens" || t.name == "targets") && i < t.values.size(); ++i)
                t.values[i] =
                    text[i / size_t(task.T) * size_t(task.T + 1) + i % size_t(task.T) + (t.name == "targets")];
    if (file) take_given(*file, &task);
    for (const NamedTensor& t : task.given)
        for (size_t i = 0; t.dtype == DType::I64 && i < t.values.size(); ++i)
            if (!(t.values[i] >= 0 && t.values[i] < double(task.config.V)))
                fail("%s, element %zu: id %.0f is outside the vocabulary of %lld", t.name.c_str(), i, t.values[i],
                     (long long)task.config.V);

    const double start = seconds();
    const std::vector<NamedTensor> computed = run(task, precision);
    for (const NamedTensor& t : computed)
        for (size_t i = 0; i < t.values.size(); ++i)
            if (!std::isfinite(t.values[i]))
                fail("%s, element %zu, is %s", t.name.c_str(), i, std::isnan(t.values[i]) ? "nan" : "infinite");
    std::map<std::string, Noise> noise;
    if (precision == "fp64") noise = measure_noise(task, computed);
    write_oracle(out, task, precision, computed, noise);
    struct stat st;
    printf("%s: %s, %s, %zu given and %zu computed tensors, %s, %.1f s\n", out.c_str(), task.kind.c_str(),
           precision.c_str(), task.given.size(), computed.size(),
           byte_text(stat(out.c_str(), &st) == 0 ? double(st.st_size) : 0).c_str(), seconds() - start);
    return 0;
}

// ---------------------------------------------------------------------------------------------------------------------
// 18  compare: an oracle and a candidate, tensor by tensor in the order of computation                   docs/oracle.md
// ---------------------------------------------------------------------------------------------------------------------

// A candidate passes a tensor if its error is at most kNoiseFactor times the noise of a right implementation, measured at
// this very size, plus half a unit of the last place of its dtype (so that exact tensors may be stored in it). A single
// number over the whole batch or a whole tensor may come out right by luck in all runs that measure noise, while another
// order of the sum is a few units off: such a number gets kSumUnits units of the arithmetic that sums up, fp32 for bf16.
//
// Adam divides a gradient by its own size: its first step is lr sign(g). An element whose gradient lies within the noise of
// bf16 may go the other way, by 2 lr, in one right implementation and not in another, and four runs may not show it (of a
// hundred, the worst were thirty times as far off, for a parameter of six numbers). So the norm of a parameter of n numbers
// may in bf16 also err by what one such element of n equals changes it in every step, 2 lr steps / sqrt(n).
constexpr double kNoiseFactor = 4, kSumUnits = 8;
constexpr double kNoisy = 0.5;  // a tolerance of this relative RMS tells little
const std::string kParamNorm = "adamw.param_norm.";
bool is_sum(const std::string& name) { return name == "loss" || name == "objective" || starts_with(name, "adamw."); }

struct Dtype {
    const char* name;
    int noise;        // which column of Noise
    double scale;     // of that column
    double half_ulp;  // relative
    double sum_ulp;   // a whole one, of sums
};
// fp64 has fp32's noise times 2^-29, the ratio of their units.
const Dtype dtypes[] = {{"fp32", 0, 1, 1.0 / (1 << 24), 1.0 / (1 << 23)},
                        {"bf16", 1, 1, 1.0 / (1 << 8), 1.0 / (1 << 23)},
                        {"fp64", 0, 1.0 / (1 << 29), 1.0 / (int64(1) << 53), 1.0 / (int64(1) << 52)}};

std::map<std::string, Noise> read_noise(const SafeTensors& file) {
    const std::string at = file.path + ": __metadata__.noise";
    const Json j = Json::parse(metadata_of(file, "noise"), at);
    if (j.type != Json::Object) fail("%s: expected an object", at.c_str());
    std::map<std::string, Noise> noise;
    for (const auto& key : j.keys) {
        bool good = key.second.type == Json::Array && key.second.items.size() == 4;
        for (size_t i = 0; good && i < 4; ++i)
            good = key.second.items[i].type == Json::Number && key.second.items[i].number >= 0 &&
                   std::isfinite(key.second.items[i].number);
        if (!good) fail("%s: '%s' is not four numbers of 0 or more", at.c_str(), key.first.c_str());
        const SafeTensors::Entry* e = file.find(key.first);
        if (!e) fail("%s: '%s' is no tensor of the file", at.c_str(), key.first.c_str());
        Noise& n = noise[key.first];
        n.order = noise.size();
        for (int which = 0; which < 2; ++which) {
            n.relative[which] = key.second.items[size_t(2 * which)].number;
            n.max_abs[which] = key.second.items[size_t(2 * which + 1)].number;
        }
    }
    return noise;
}

std::string index_text(int64 element, const Shape& shape) {
    std::string s;
    for (size_t i = shape.size(); i-- > 0;) {
        s = std::to_string(element % shape[i]) + (s.empty() ? "" : ",") + s;
        element /= shape[i];
    }
    return "[" + s + "]";
}

// Whether swapping two neighbouring dimensions of the candidate makes it agree: the commonest mistake in a dump.
std::string transposition(const Vec& candidate, const Vec& oracle, const Shape& from, double allowed) {
    for (size_t d = 0; d + 1 < from.size(); ++d) {
        int64 outer = 1, inner = 1;
        for (size_t i = 0; i < d; ++i) outer *= from[i];
        for (size_t i = d + 2; i < from.size(); ++i) inner *= from[i];
        const int64 m = from[d], n = from[d + 1];
        if (m == 1 || n == 1) continue;
        Vec swapped(candidate.size());
        for (int64 o = 0; o < outer; ++o)
            for (int64 i = 0; i < m; ++i)
                for (int64 j = 0; j < n; ++j)
                    for (int64 k = 0; k < inner; ++k)
                        swapped[size_t(((o * n + j) * m + i) * inner + k)] =
                            candidate[size_t(((o * m + i) * n + j) * inner + k)];
        if (error_between(swapped, oracle).relative <= allowed)
            return format("dimensions %zu and %zu are swapped", d, d + 1);
    }
    return "";
}

struct Verdict {
    enum Kind { agrees, differs, missing } kind = agrees;
    std::string name, shape, remark;
    double relative = 0, allowed_relative = 0, max_abs = 0, allowed_max = 0;
    std::vector<std::string> details;
};

bool selected(const std::string& name, const std::vector<std::string>& prefixes) {
    for (const std::string& p : prefixes)
        if (name == p || starts_with(name, p + ".")) return true;
    return prefixes.empty();
}

Verdict compare_tensor(const SafeTensors& oracle, const SafeTensors::Entry& want, const SafeTensors& candidate,
                       const OracleTask& task, const std::map<std::string, Noise>& noise, const Dtype& dtype,
                       double slack) {
    Verdict v;
    v.name = want.name;
    v.shape = to_text(want.shape);
    const SafeTensors::Entry* got = candidate.find(want.name);
    if (!got) {
        v.kind = Verdict::missing;
        return v;
    }
    const auto differs = [&](const std::string& remark) {
        v.kind = Verdict::differs;
        v.remark = remark;
    };
    const auto integer = [](DType t) { return t == DType::I64 || t == DType::I32; };
    if (integer(got->dtype) != integer(want.dtype)) {
        differs(format("the candidate holds %s, expected %s", dtype_name(got->dtype),
                       integer(want.dtype) ? "integers" : "floating-point numbers"));
        return v;
    }
    if (got->shape != want.shape && !(element_count(got->shape) == 1 && element_count(want.shape) == 1)) {
        Shape a = got->shape, b = want.shape;
        std::sort(a.begin(), a.end());
        std::sort(b.begin(), b.end());
        differs(format("the candidate has shape %s, expected %s%s", to_text(got->shape).c_str(), v.shape.c_str(),
                       a == b ? ": the same dimensions in another order" : ""));
        return v;
    }
    Vec exact, values;
    read_values(oracle, want, &exact, true);
    read_values(candidate, *got, &values, false);
    const TensorError e = error_between(values, exact);
    double largest = 0;
    for (const double x : exact) largest = std::max(largest, std::fabs(x));
    const auto known = noise.find(want.name);
    const bool computed = known != noise.end() && want.dtype == DType::F64;  // else exactly the same
    const double storage = is_sum(want.name) ? kSumUnits * dtype.sum_ulp : dtype.half_ulp;
    if (computed) {
        const double factor = slack * kNoiseFactor * dtype.scale;
        v.allowed_relative = factor * known->second.relative[dtype.noise] + storage;
        v.allowed_max = factor * known->second.max_abs[dtype.noise] + storage * largest;
    }
    double turned = 0;  // elements that Adam may move the other way
    if (computed && dtype.noise == 1 && starts_with(want.name, kParamNorm)) {
        const SafeTensors::Entry* parameter = oracle.find(want.name.substr(kParamNorm.size()));
        if (!parameter) fail("%s: '%s' is there, its parameter is not", oracle.path.c_str(), want.name.c_str());
        turned = slack * 2 * task.lr * double(task.adamw_steps) / std::sqrt(double(element_count(parameter->shape)));
        v.allowed_relative += turned / largest;
        v.allowed_max += turned;
    }
    v.relative = e.relative;
    v.max_abs = e.max_abs;
    // However great the noise is, a tensor that was never filled in is no result.
    const auto zero = [](const Vec& x) { return std::all_of(x.begin(), x.end(), [](double a) { return a == 0; }); };
    const bool empty = computed && zero(values) && !zero(exact);
    if (e.finite && e.relative <= v.allowed_relative && e.max_abs <= v.allowed_max && !empty) return v;
    const size_t i = size_t(e.worst);
    differs(format("%s: oracle %.9g, candidate %.9g", index_text(e.worst, want.shape).c_str(), exact[i], values[i]));
    if (!e.finite) {
        v.details.push_back("the candidate's number is not finite");
        return v;
    }
    if (!computed) {
        v.details.push_back("it is given, or counts something: it must be the same number");
    } else {
        v.details.push_back(
            format("allowed: %g times the noise of a right %s implementation at this size (relative RMS "
                   "%.2g, max abs %.2g) + %s in the last place",
                   slack * kNoiseFactor, dtype.name, known->second.relative[dtype.noise] * dtype.scale,
                   known->second.max_abs[dtype.noise] * dtype.scale,
                   is_sum(want.name) ? format("%g units", kSumUnits).c_str() : "half a unit"));
        if (turned > 0) v.details.back() += format(" + %.2g for elements whose gradient's sign is noise", turned);
    }
    if (empty) v.details.push_back("the candidate is zero everywhere");
    const std::string swapped = transposition(values, exact, want.shape, v.allowed_relative);
    if (!swapped.empty()) v.details.push_back(swapped + ": that way it agrees");
    return v;
}

int compare_command(int argc, char** argv) {
    std::string dtype_name_ = "fp32";
    std::vector<std::string> only, files;
    bool partial = false;
    double slack = 1;
    Options o(
        "ref_cpu",
        "ref_cpu compare ORACLE.safetensors CANDIDATE.safetensors [options]\n\nWalks the oracle's tensors in the order "
        "of computation, names the first that the candidate has wrong, then\nlists all. Exit status 0 only if every "
        "tensor asked for is there and agrees (docs/oracle.md).");
    o.add("dtype", &dtype_name_, "what the candidate was computed in: fp32, bf16 or fp64");
    o.add("only", &only, "names, or what they begin with up to a dot: layers.3.ssd grad.layers.3.ssd");
    o.add("partial", &partial, "tensors that the candidate lacks are no mistake");
    o.add("slack", &slack, "multiplies the tolerances", 0, 1e6);
    if (!o.parse(argc, argv, 1, &files)) return 0;
    if (files.size() != 2)
        usage_error("compare: expected two files, an oracle and a candidate; found %zu", files.size());
    const Dtype* dtype = nullptr;
    for (const Dtype& d : dtypes)
        if (dtype_name_ == d.name) dtype = &d;
    if (!dtype) usage_error("--dtype: '%s' is not fp32, bf16 or fp64", dtype_name_.c_str());

    SafeTensors oracle(files[0]);
    const SafeTensors candidate(files[1]);
    const OracleTask task = task_of(oracle);
    if (metadata_of(oracle, "precision") != "fp64")
        fail("%s: was computed in %s: expected an oracle (fp64) as the first file", files[0].c_str(),
             metadata_of(oracle, "precision").c_str());
    const std::map<std::string, Noise> noise = read_noise(oracle);
    // The order of computation is that of the noise: a file may have been written again in another one. What was given
    // comes first.
    const auto order = [&](const SafeTensors::Entry& e) {
        const auto n = noise.find(e.name);
        return n == noise.end() ? 0 : n->second.order;
    };
    std::stable_sort(oracle.entries.begin(), oracle.entries.end(),
                     [&](const auto& a, const auto& b) { return order(a) < order(b); });
    for (const char* key : {"schema", "kind", "inputs_sha256"}) {
        const auto theirs = candidate.metadata.find(key);
        if (theirs != candidate.metadata.end() && theirs->second != metadata_of(oracle, key))
            fail("%s: __metadata__.%s differs from that of %s: it was made from other inputs", files[1].c_str(), key,
                 files[0].c_str());
    }
    for (const std::string& p : only) {
        bool any = false;
        std::vector<std::string> names;
        for (const SafeTensors::Entry& e : oracle.entries) {
            any = any || selected(e.name, {p});
            names.push_back(e.name);
        }
        if (!any)
            usage_error("--only: no tensor of %s is called or begins with '%s'; did you mean '%s'?", files[0].c_str(),
                        p.c_str(), nearest_word(p, names).c_str());
    }

    std::vector<Verdict> verdicts;
    const Verdict* first = nullptr;
    int64 count[3] = {0, 0, 0}, given_back = 0, noisy = 0;
    std::string noisiest;
    for (const SafeTensors::Entry& e : oracle.entries) {
        if (!selected(e.name, only)) continue;
        const bool given = !noise.count(e.name);
        Verdict v = compare_tensor(oracle, e, candidate, task, noise, *dtype, slack);
        if (given && v.kind != Verdict::differs) {  // nobody has to give back what was given, and it proves nothing
            given_back += v.kind == Verdict::agrees;
            continue;
        }
        ++count[v.kind];
        if (v.kind == Verdict::agrees && v.allowed_relative >= kNoisy && noisy++ == 0) noisiest = v.name;
        verdicts.push_back(v);
    }
    for (const Verdict& v : verdicts)
        if (!first && v.kind == Verdict::differs) first = &v;

    printf("%s: %s, %zu tensors; %s: %zu tensors; %s tolerances%s\n", files[0].c_str(), task.kind.c_str(),
           oracle.entries.size(), files[1].c_str(), candidate.entries.size(), dtype->name,
           slack == 1 ? "" : format(" times %g", slack).c_str());
    std::vector<std::string> strangers;
    for (const SafeTensors::Entry& e : candidate.entries)
        if (!oracle.find(e.name)) strangers.push_back(e.name);
    std::vector<std::string> names;
    for (const SafeTensors::Entry& e : oracle.entries) names.push_back(e.name);
    for (size_t i = 0; i < strangers.size() && i < 5; ++i)
        printf("%s: the oracle has no tensor of this name; did you mean %s?\n", strangers[i].c_str(),
               nearest_word(strangers[i], names).c_str());
    if (strangers.size() > 5) printf("... and %zu more such names\n", strangers.size() - 5);

    if (first) {
        printf("\nFIRST DIFFERENCE: %s %s\n    %s\n", first->name.c_str(), first->shape.c_str(), first->remark.c_str());
        if (!first->details.empty() && std::isfinite(first->relative))
            printf("    relative RMS %.3g (allowed %.3g), max abs %.3g (allowed %.3g)\n", first->relative,
                   first->allowed_relative, first->max_abs, first->allowed_max);
        for (const std::string& d : first->details) printf("    %s\n", d.c_str());
    }
    printf("\n%-9s %-58s %-20s %12s %12s %12s %12s\n", "", "tensor", "shape", "relative RMS", "allowed", "max abs",
           "allowed");
    static const char* const words[] = {"ok", "DIFFERS", "missing"};
    for (const Verdict& v : verdicts) {
        printf("%-9s %-58s %-20s", words[v.kind], v.name.c_str(), v.shape.c_str());
        if (v.kind == Verdict::missing) printf("\n");
        else if (v.kind == Verdict::differs && v.details.empty()) printf(" %s\n", v.remark.c_str());
        else printf(" %12.2e %12.2e %12.2e %12.2e\n", v.relative, v.allowed_relative, v.max_abs, v.allowed_max);
    }
    const int64 lacking = count[Verdict::missing];
    printf("\n%lld agree, %lld differ, %lld missing; %lld given tensors came back the same\n",
           (long long)count[Verdict::agrees], (long long)count[Verdict::differs], (long long)lacking,
           (long long)given_back);
    if (count[Verdict::agrees] + count[Verdict::differs] == 0)
        fail("%s: holds none of the tensors asked for", files[1].c_str());
    if (noisy)
        printf("%lld of them may err by a relative RMS of %g or more (first: %s): too noisy in %s to prove anything\n",
               (long long)noisy, kNoisy, noisiest.c_str(), dtype->name);
    if (lacking && !partial && !count[Verdict::differs])
        printf("missing tensors count as mistakes: --only names those to be compared, --partial lets them pass\n");
    return count[Verdict::differs] || (lacking && !partial) ? 1 : 0;
}

}  // namespace
}  // namespace ref
#endif

// ---------------------------------------------------------------------------------------------------------------------
// 19  main
// ---------------------------------------------------------------------------------------------------------------------

#ifdef REF_CPU_MAIN
int main(int argc, char** argv) {
    spin_briefly(argv);
    return run_main("ref_cpu", [&] {
        const std::string command = argc > 1 ? argv[1] : "--help";
        if (command == "bench") return ref::bench_command(argc - 1, argv + 1);
        if (command == "gradcheck") return ref::gradcheck_command(argc - 1, argv + 1);
        if (command == "oracle") return ref::oracle_command(argc - 1, argv + 1);
        if (command == "compare") return ref::compare_command(argc - 1, argv + 1);
        if (command == "--help" || command == "-h") {
            printf(
                "ref_cpu: the CPU reference of TransXSSM.\n\n%s"
                "    bench                 time a train step, decoding and the matrix product on this machine\n"
                "    gradcheck             compare every gradient with central differences\n"
                "    oracle                write every number of a pass, in double, for other implementations\n"
                "    compare ORACLE FILE   find the first tensor that another implementation has wrong\n\n"
                "ref_cpu COMMAND --help lists a command's options.\n",
                model_command_help());
            return 0;
        }
        return model_command("ref_cpu", argc - 1, argv + 1, {"fp32"},
                             [](const Config& c, const std::string&) { return make_cpu_engine(c); },
                             {"bench", "gradcheck", "oracle", "compare"});
    });
}
#endif
