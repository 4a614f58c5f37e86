// transxssm.cu: the whole model on one NVIDIA GPU, forward and backward by hand, in the order of ref_cpu.cpp.
//
// READING GUIDE. Read ref_cpu.cpp first: it has the equations and why they hold. The sections here have the same
// numbers and names; each op is its forward kernel, its backward kernel, and a launcher with the reference's argument
// order.
//
//   1  small helpers      errors, launches, vectors of 8 numbers, sums over a block
//   2  matmul             cuBLASLt, wrapped once; and products of tiles on chip, for sections 6 and 7
//   3  embedding
//   4  RMSNorm            forward; its backward is part of section 8
//   5  RoPE
//   6  attention          tiled, online softmax
//   7  SSD                one block sweeps the chunks of one (sequence, head), its state in registers
//   8  residual           learned skip + dropout + the norm that follows, in one pass over memory
//   9  SwiGLU
//  10  cross-entropy      loss and gradient in one pass
//  11  AdamW              all parameters in one launch
//  11b decoding           one further token of each sequence
//  12  the model          one forward for training, prefill and decode; one backward
//  13  the engine         behind the interface of transxssm.h
//  14  twins for tests    the launchers on host arrays
//  15  benchmark
//  16  main
//
// NUMBERS. A, the type of activations, is __nv_bfloat16 (default) or float (for comparisons; no TF32 anywhere).
// Whatever A is: sums, norms, softmax, dt, dA, cs, SSD states, losses, master weights, gradients and moments are
// fp32.
//
// SAME BITS EVERY RUN. No floating-point atomics. A sum that many blocks share is written as one partial sum per
// block, and one more kernel adds those up in order. The order depends on shapes alone.
//
// SIZES. Offsets are 64-bit. Matrix products are several times slower where rows do not begin at multiples of 8
// elements. The widths that often are no such multiple, of the mixer's projection and of the logits, are padded in
// memory: their rows are ld = padded8(width) elements apart and end in zeros.
#include <cublasLt.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <tuple>
#include <type_traits>

#include "transxssm.h"

// The kernels take a minute to compile: main(), at the end, is compiled by itself and linked to them.
#ifndef TRANSXSSM_MAIN

namespace cuda {

using bf16 = __nv_bfloat16;
using ref::AttentionShape;
using ref::Dropout;
using ref::Layout;
using ref::SsdShape;

// ---------------------------------------------------------------------------------------------------------------------
// 1  Small helpers
// ---------------------------------------------------------------------------------------------------------------------

static void check(cudaError_t e, const char* what) {
    if (e == cudaSuccess) return;
    cudaGetLastError();  // so that the next call does not report it again
    fail("GPU: %s: %s", what, cudaGetErrorString(e));
}
#define CHECK_CUDA(call) check(call, #call)

static int64 ceil_div(int64 a, int64 b) { return (a + b - 1) / b; }
static int64 round_up(int64 a, int64 b) { return ceil_div(a, b) * b; }
static int64 padded8(int64 n) { return round_up(n, 8); }

// Where the time of a step goes (bench): an event after each launch. Off: one test of a pointer.
struct Profile {
    std::vector<std::pair<std::string, cudaEvent_t>> marks;
    void mark(const char* name, cudaStream_t stream) {
        cudaEvent_t e;
        CHECK_CUDA(cudaEventCreate(&e));
        CHECK_CUDA(cudaEventRecord(e, stream));
        marks.emplace_back(name, e);
    }
    ~Profile() {
        for (auto& m : marks) cudaEventDestroy(m.second);
    }
};
static Profile* profile = nullptr;

template <class T>
struct Same {
    using type = T;
};
// kernel<<<blocks, threads, shared, stream>>>(arguments), checked. Grids have one dimension, which may count to 2^31
// - 1.
template <class... P>
static void launch(const char* name, void (*kernel)(P...), int64 blocks, int threads, size_t shared,
                   cudaStream_t stream, typename Same<P>::type... arguments) {
    if (blocks < 1 || blocks > INT32_MAX) fail("GPU: %s: %lld blocks: expected 1 to 2^31-1", name, (long long)blocks);
    if (shared > 48 * 1024) {
        const cudaError_t e =
            cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (e != cudaSuccess) {
            cudaGetLastError();
            fail("GPU: %s: needs %zu bytes of shared memory, more than this GPU has per block", name, shared);
        }
    }
    kernel<<<unsigned(blocks), unsigned(threads), shared, stream>>>(arguments...);
    check(cudaGetLastError(), name);
    if (profile) profile->mark(name, stream);
}

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(bf16 x) { return __bfloat162float(x); }
template <class A>
__device__ inline A from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
    return x;
}
template <>
__device__ inline bf16 from_float<bf16>(float x) {
    return __float2bfloat16(x);
}

// W neighbouring numbers, moved in as few instructions as their alignment (to W numbers) allows. Kernels that only
// stream through memory are templates on W: 8 where rows are multiples of 8, else 1.
template <class A, int W>
struct alignas(sizeof(A) * W) Pack {
    A v[W];
};
template <int W, class A>
__device__ inline void load(float (&f)[W], const A* p) {
    const Pack<A, W> x = *reinterpret_cast<const Pack<A, W>*>(p);
#pragma unroll
    for (int i = 0; i < W; ++i) f[i] = to_float(x.v[i]);
}
template <int W, class A>
__device__ inline void store(A* p, const float (&f)[W]) {
    Pack<A, W> x;
#pragma unroll
    for (int i = 0; i < W; ++i) x.v[i] = from_float<A>(f[i]);
    *reinterpret_cast<Pack<A, W>*>(p) = x;
}
// Two neighbours at an even offset.
template <class A>
__device__ inline void store2(A* p, float a, float b) {
    const float f[2] = {a, b};
    store<2>(p, f);
}

// 2^x by the hardware's instruction: relative error 2^-22.
__device__ inline float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
constexpr float kLog2e = 1.44269504f, kLn2 = 0.693147181f;
// exp(x): to float's accuracy where the result stays fp32, by the hardware where it is rounded to bf16.
template <class A>
__device__ inline float exp_for(float x) {
    return std::is_same<A, float>::value ? expf(x) : exp2_fast(x * kLog2e);
}

__device__ inline float warp_sum(float x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x += __shfl_xor_sync(~0u, x, d);
    return x;
}
// Sum over the 4 threads of a warp that hold one row of an Accumulator (section 2).
__device__ inline float quad_sum(float x) {
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}
__device__ inline float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2));
}

// gradient[c] += sum over blocks of partial[block][c], c < columns; for `split` = 2 the columns are two halves that
// go to two gradients. One block per 32 columns: 8 threads share a column, each adding every 8th partial sum.
__global__ void add_partials_kernel(float* gradient, float* gradient2, const float* partial, int64 blocks,
                                    int64 columns, int64 half) {
    __shared__ float sums[8][32];
    const int64 c = int64(blockIdx.x) * 32 + threadIdx.x % 32;
    const int part = int(threadIdx.x) / 32;
    float s = 0;
    if (c < columns)
        for (int64 b = part; b < blocks; b += 8) s += partial[b * columns + c];
    sums[part][threadIdx.x % 32] = s;
    __syncthreads();
    if (part > 0 || c >= columns) return;
    s = 0;
    for (int i = 0; i < 8; ++i) s += sums[i][threadIdx.x];
    if (c < half) gradient[c] += s;
    else if (gradient2) gradient2[c - half] += s;
}
static void add_partials(float* gradient, float* gradient2, const float* partial, int64 blocks, int64 columns,
                         int64 half, cudaStream_t stream) {
    launch("add_partials", add_partials_kernel, ceil_div(columns, 32), 256, 0, stream, gradient, gradient2, partial,
           blocks, columns, half);
}
static constexpr int64 kPartialBlocks = 1024;  // blocks that share a sum over rows, at most

// ---------------------------------------------------------------------------------------------------------------------
// 2  matmul: cuBLASLt for matrices in memory
// ---------------------------------------------------------------------------------------------------------------------
// cuBLASLt counts matrices by columns; ours are by rows. The same memory read by columns is the transpose, so that
//
//      ours, by rows                       the same memory, by columns
//      C (M,N) = A (M,K) B (K,N)     =     C' (N,M) = B' (N,K) A' (K,M)
//
// and it is enough to swap A and B and to pass N before M. An operand that we want transposed is one for them too. Of
// the algorithms that the library's heuristic proposes the first is taken: a choice by rule, not by a race against
// the clock. Reductions in place are excluded, the others add up in a fixed order.

class Blas {
  public:
    Blas() {
        const cublasStatus_t s = cublasLtCreate(&handle);
        if (s != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: cannot start: %s", cublasLtGetStatusString(s));
        if (cudaMalloc(&workspace, kWorkspace) != cudaSuccess) fail("GPU: no %zu bytes for cuBLASLt", kWorkspace);
    }
    ~Blas() {
        for (auto& p : plans) {
            cublasLtMatrixLayoutDestroy(p.second.a);
            cublasLtMatrixLayoutDestroy(p.second.b);
            cublasLtMatrixLayoutDestroy(p.second.c);
            cublasLtMatmulDescDestroy(p.second.op);
        }
        cudaFree(workspace);
        cublasLtDestroy(handle);
    }
    Blas(const Blas&) = delete;
    Blas& operator=(const Blas&) = delete;

    // C (M,N) = alpha A (M,K) B (K,N), or +=. ld: row stride as stored; a transposed operand is stored (K,M) or (N,K).
    template <class C, class A>
    void matmul(const char* name, C* c, int64 ldc, const A* a, int64 lda, Layout la, const A* b, int64 ldb, Layout lb,
                int64 M, int64 N, int64 K, float alpha, bool accumulate, cudaStream_t stream) {
        const Key key{type<C>(), type<A>(),  la,           lb,           M,           N, K, lda, ldb,
                      ldc,       accumulate, alignment(a), alignment(b), alignment(c)};
        auto it = plans.find(key);
        if (it == plans.end()) it = plans.emplace(key, plan(key)).first;
        const Plan& p = it->second;
        const float beta = accumulate ? 1.0f : 0.0f;
        const cublasStatus_t s = cublasLtMatmul(handle, p.op, &alpha, b, p.b, a, p.a, &beta, c, p.c, c, p.c,
                                                &p.algorithm, workspace, kWorkspace, stream);
        if (s != CUBLAS_STATUS_SUCCESS)
            fail("cuBLASLt: %s, (%lld,%lld) = (%lld,%lld) (%lld,%lld): %s", name, (long long)M, (long long)N,
                 (long long)M, (long long)K, (long long)K, (long long)N, cublasLtGetStatusString(s));
        if (profile) profile->mark(name, stream);
    }

  private:
    using Key = std::tuple<int, int, Layout, Layout, int64, int64, int64, int64, int64, int64, bool, int, int, int>;
    struct Plan {
        cublasLtMatmulDesc_t op;
        cublasLtMatrixLayout_t a, b, c;
        cublasLtMatmulAlgo_t algorithm;
    };
    static constexpr size_t kWorkspace = size_t(64) << 20;
    cublasLtHandle_t handle = nullptr;
    void* workspace = nullptr;
    std::map<Key, Plan> plans;

    template <class T>
    static int type() {
        return std::is_same<T, float>::value ? CUDA_R_32F : CUDA_R_16BF;
    }
    static int alignment(const void* p) {  // the largest power of two that divides the address, up to 256
        int n = 256;
        while (uintptr_t(p) % uintptr_t(n)) n /= 2;
        return n;
    }
    static void check(cublasStatus_t s, const char* what) {
        if (s != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: %s: %s", what, cublasLtGetStatusString(s));
    }
    Plan plan(const Key& key) const {
        const auto [type_c, type_ab, la, lb, M, N, K, lda, ldb, ldc, accumulate, align_a, align_b, align_c] = key;
        (void)accumulate;
        Plan p;
        const cublasOperation_t ta = la == Layout::plain ? CUBLAS_OP_N : CUBLAS_OP_T;
        const cublasOperation_t tb = lb == Layout::plain ? CUBLAS_OP_N : CUBLAS_OP_T;
        check(cublasLtMatmulDescCreate(&p.op, CUBLAS_COMPUTE_32F, CUDA_R_32F), "descriptor");
        check(cublasLtMatmulDescSetAttribute(p.op, CUBLASLT_MATMUL_DESC_TRANSA, &tb, sizeof tb), "descriptor");
        check(cublasLtMatmulDescSetAttribute(p.op, CUBLASLT_MATMUL_DESC_TRANSB, &ta, sizeof ta), "descriptor");
        const auto layout = [](cublasLtMatrixLayout_t* l, int t, int64 rows, int64 columns, int64 ld) {
            check(cublasLtMatrixLayoutCreate(l, cudaDataType(t), uint64_t(columns), uint64_t(rows), ld), "layout");
        };
        layout(&p.a, type_ab, la == Layout::plain ? M : K, la == Layout::plain ? K : M, lda);
        layout(&p.b, type_ab, lb == Layout::plain ? K : N, lb == Layout::plain ? N : K, ldb);
        layout(&p.c, type_c, M, N, ldc);
        cublasLtMatmulPreference_t preference;
        check(cublasLtMatmulPreferenceCreate(&preference), "preference");
        const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t which, const auto& value) {
            check(cublasLtMatmulPreferenceSetAttribute(preference, which, &value, sizeof value), "preference");
        };
        prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64_t(kWorkspace));
        prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
               uint32_t(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE | CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t(align_b));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t(align_a));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t(align_c));
        prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t(align_c));
        cublasLtMatmulHeuristicResult_t found{};
        int count = 0;
        const cublasStatus_t s =
            cublasLtMatmulAlgoGetHeuristic(handle, p.op, p.b, p.a, p.c, p.c, preference, 1, &found, &count);
        cublasLtMatmulPreferenceDestroy(preference);
        if (s != CUBLAS_STATUS_SUCCESS || count < 1)
            fail("cuBLASLt: no algorithm for (%lld,%lld) = (%lld,%lld) (%lld,%lld), row strides %lld, %lld, %lld: %s",
                 (long long)M, (long long)N, (long long)M, (long long)K, (long long)K, (long long)N, (long long)ldc,
                 (long long)lda, (long long)ldb, cublasLtGetStatusString(s));
        p.algorithm = found.algo;
        return p;
    }
};

// The three products of a linear layer. Rows of y and dy are ldy apart; x, dx, w and dw are dense.
// y (rows,out) = x (rows,in) W^T
template <class Y, class A>
static void linear_forward(Blas& blas, Y* y, int64 ldy, const A* x, const A* w, int64 rows, int64 in, int64 out,
                           cudaStream_t stream) {
    blas.matmul("matmul y = x W'", y, ldy, x, in, Layout::plain, w, in, Layout::transposed, rows, out, in, 1, false,
                stream);
}
// dx (rows,in) = scale dy (rows,out) W
template <class A>
static void linear_backward_input(Blas& blas, A* dx, const A* dy, int64 ldy, const A* w, int64 rows, int64 in,
                                  int64 out, float scale, cudaStream_t stream) {
    blas.matmul("matmul dx = dy W", dx, in, dy, ldy, Layout::plain, w, in, Layout::plain, rows, in, out, scale, false,
                stream);
}
// dW (out,in) += scale dy^T x
template <class A>
static void linear_backward_weight(Blas& blas, float* dw, const A* dy, int64 ldy, const A* x, int64 rows, int64 in,
                                   int64 out, float scale, cudaStream_t stream) {
    blas.matmul("matmul dW += dy' x", dw, in, dy, ldy, Layout::transposed, x, in, Layout::plain, out, in, rows, scale,
                true, stream);
}

// ---- Products of tiles in shared memory ------------------------------------------------------------------------------
// Attention and SSD multiply tiles that never leave the chip. A warp owns 16 rows and 8 NT columns of an output and
// keeps them in registers, distributed as the tensor cores' instruction m16n8k16 returns them:
//
//      columns  8t + 0 1 | 2 3 | 4 5 | 6 7          v[t][0], v[t][1]: row lane/4,     columns 8t + 2 (lane%4) + 0, 1
//      row 0    lane   0 |  1  |  2  |  3           v[t][2], v[t][3]: row lane/4 + 8, the same columns
//      row 1    lane   4 |  5  |  6  |  7
//
// multiply() is written twice, with tensor cores for bf16 and with plain multiply-adds for float; kernels do not see
// the difference. Tiles have rows of (columns + kTilePad) elements, so that 8 rows lie in different banks. All sizes
// are multiples of 16; what a matrix does not fill is zero.

template <int NT>
struct Accumulator {
    float v[NT][4];
    __device__ void zero() {
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) v[t][i] = 0;
    }
    // Multiplies row lane/4 by `a` and row lane/4 + 8 by `b`.
    __device__ void scale_rows(float a, float b) {
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            v[t][0] *= a;
            v[t][1] *= a;
            v[t][2] *= b;
            v[t][3] *= b;
        }
    }
};
template <class A>
constexpr int kTilePad = 16 / int(sizeof(A));  // 16 bytes

__device__ inline int lane_id() { return int(threadIdx.x) % 32; }
__device__ inline int acc_row() { return lane_id() / 4; }        // and + 8
__device__ inline int acc_col() { return 2 * (lane_id() % 4); }  // and + 1

// Four 8 x 8 matrices of bf16 from shared memory: lane i gives the address of row i%8 of matrix i/8.
template <bool transpose>
__device__ inline void load_matrices(uint32_t (&r)[4], const bf16* row) {
    const uint32_t address = uint32_t(__cvta_generic_to_shared(row));
    if (transpose)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                     : "r"(address)
                     : "memory");
}
__device__ inline void mma16816(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// acc (16, 8 NT) += a (16,K) b (K, 8 NT). a and b point to the first element that takes part; a plain: element (m,k) is
// a[m*lda + k], transposed: a[k*lda + m]; b plain: element (k,n) is b[k*ldb + n], transposed: b[n*ldb + k].
template <Layout la, Layout lb, int NT>
__device__ inline void multiply(Accumulator<NT>& acc, const bf16* a, int lda, const bf16* b, int ldb, int K) {
    static_assert(NT % 2 == 0, "two column tiles at a time");
    const int r = lane_id() % 8, m = lane_id() / 8, low = m % 2 * 8, high = m / 2 * 8;
    // The four matrices of a: (rows 0-7, k 0-7), (rows 8-15, k 0-7), (rows 0-7, k 8-15), (rows 8-15, k 8-15).
    const bf16* pa = la == Layout::plain ? a + (r + low) * lda + high : a + (r + high) * lda + low;
    // Of b: (k 0-7, columns 0-7), (k 8-15, columns 0-7), (k 0-7, columns 8-15), (k 8-15, columns 8-15).
    const bf16* pb = lb == Layout::plain ? b + (r + low) * ldb + high : b + (r + high) * ldb + low;
#pragma unroll 4
    for (int k = 0; k < K; k += 16) {
        uint32_t fa[4];
        load_matrices<la == Layout::transposed>(fa, la == Layout::plain ? pa + k : pa + k * lda);
#pragma unroll
        for (int t = 0; t < NT; t += 2) {
            uint32_t fb[4];
            load_matrices<lb == Layout::plain>(fb, lb == Layout::plain ? pb + k * ldb + 8 * t : pb + 8 * t * ldb + k);
            mma16816(acc.v[t], fa, fb[0], fb[1]);
            mma16816(acc.v[t + 1], fa, fb[2], fb[3]);
        }
    }
}
template <Layout la, Layout lb, int NT>
__device__ inline void multiply(Accumulator<NT>& acc, const float* a, int lda, const float* b, int ldb, int K) {
    const int row = acc_row(), col = acc_col();
    for (int k = 0; k < K; ++k) {
        const float a0 = la == Layout::plain ? a[row * lda + k] : a[k * lda + row];
        const float a1 = la == Layout::plain ? a[(row + 8) * lda + k] : a[k * lda + row + 8];
#pragma unroll
        for (int t = 0; t < NT; ++t) {
            const int n = 8 * t + col;
            const float b0 = lb == Layout::plain ? b[k * ldb + n] : b[n * ldb + k];
            const float b1 = lb == Layout::plain ? b[k * ldb + n + 1] : b[(n + 1) * ldb + k];
            acc.v[t][0] += a0 * b0;
            acc.v[t][1] += a0 * b1;
            acc.v[t][2] += a1 * b0;
            acc.v[t][3] += a1 * b1;
        }
    }
}

// 16 rows of K columns of an operand a that is used again and again, or that an accumulator already holds. bf16:
// fragments in registers. An accumulator's layout is that of the fragments, so that a product can go on into the next
// one without shared memory. float: just where the rows are; an accumulator is first written to `patch` (16 x K, the
// warp's own).
template <class A, int K>
struct Rows;
template <int K>
struct Rows<bf16, K> {
    uint32_t r[K / 16][4];
    __device__ void load(const bf16* a, int lda) {
        const bf16* p = a + (lane_id() % 8 + lane_id() / 8 % 2 * 8) * lda + lane_id() / 16 * 8;
#pragma unroll
        for (int k = 0; k < K / 16; ++k) load_matrices<false>(r[k], p + 16 * k);
    }
    __device__ static uint32_t pack(float a, float b) {
        const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
        uint32_t bits;
        memcpy(&bits, &two, 4);
        return bits;
    }
    __device__ void take(const Accumulator<K / 8>& acc, bf16*) {
#pragma unroll
        for (int k = 0; k < K / 16; ++k) {
            r[k][0] = pack(acc.v[2 * k][0], acc.v[2 * k][1]);
            r[k][1] = pack(acc.v[2 * k][2], acc.v[2 * k][3]);
            r[k][2] = pack(acc.v[2 * k + 1][0], acc.v[2 * k + 1][1]);
            r[k][3] = pack(acc.v[2 * k + 1][2], acc.v[2 * k + 1][3]);
        }
    }
};
template <int K>
struct Rows<float, K> {
    const float* p;
    int ld;
    __device__ void load(const float* a, int lda) {
        p = a;
        ld = lda;
    }
    __device__ void take(const Accumulator<K / 8>& acc, float* patch) {
        ld = K + kTilePad<float>;
        p = patch;
        __syncwarp();  // the warp has read what it wrote there before
#pragma unroll
        for (int t = 0; t < K / 8; ++t)
#pragma unroll
            for (int i = 0; i < 4; i += 2)
                store2(patch + (acc_row() + 4 * i) * ld + 8 * t + acc_col(), acc.v[t][i], acc.v[t][i + 1]);
        __syncwarp();
    }
};
// Elements of shared memory that the warps' patches take.
template <class A>
constexpr int kPatch = std::is_same<A, float>::value ? 16 * (64 + kTilePad<float>) : 0;

template <Layout lb, int K, int NT>
__device__ inline void multiply(Accumulator<NT>& acc, const Rows<bf16, K>& a, const bf16* b, int ldb) {
    const int r = lane_id() % 8, m = lane_id() / 8, low = m % 2 * 8, high = m / 2 * 8;
    const bf16* pb = lb == Layout::plain ? b + (r + low) * ldb + high : b + (r + high) * ldb + low;
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
#pragma unroll
        for (int t = 0; t < NT; t += 2) {
            uint32_t fb[4];
            load_matrices<lb == Layout::plain>(
                fb, lb == Layout::plain ? pb + 16 * k * ldb + 8 * t : pb + 8 * t * ldb + 16 * k);
            mma16816(acc.v[t], a.r[k], fb[0], fb[1]);
            mma16816(acc.v[t + 1], a.r[k], fb[2], fb[3]);
        }
}
template <Layout lb, int K, int NT>
__device__ inline void multiply(Accumulator<NT>& acc, const Rows<float, K>& a, const float* b, int ldb) {
    multiply<Layout::plain, lb>(acc, a.p, a.ld, b, ldb, K);
}

// Copies `rows` x `cols` elements from memory (rows `ld` apart) into a tile and fills it up to all_rows x all_cols with
// zeros. All threads of the block take part; copies go on in the background until copies_done().
template <class A>
__device__ inline void load_tile(A* tile, int tile_ld, const A* from, int64 ld, int rows, int all_rows, int cols,
                                 int all_cols) {
    constexpr int W = 16 / int(sizeof(A));
    const bool aligned = (uintptr_t(from) | uintptr_t(ld * int64(sizeof(A)))) % 16 == 0 && cols % W == 0;
    if (aligned) {
        const int per_row = all_cols / W;
        for (int i = int(threadIdx.x); i < all_rows * per_row; i += int(blockDim.x)) {
            const int r = i / per_row, c = i % per_row * W;
            const bool inside = r < rows && c < cols;
            const A* source = inside ? from + r * ld + c : from;
            const uint32_t to = uint32_t(__cvta_generic_to_shared(tile + r * tile_ld + c));
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(source), "r"(inside ? 16 : 0)
                         : "memory");  // the last operand is how many bytes are read; zeros follow
        }
    } else {
        for (int i = int(threadIdx.x); i < all_rows * all_cols; i += int(blockDim.x)) {
            const int r = i / all_cols, c = i % all_cols;
            tile[r * tile_ld + c] = r < rows && c < cols ? from[r * ld + c] : from_float<A>(0.0f);
        }
    }
}
__device__ inline void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// What was begun since the last commit is one group; waits until at most `later` groups are under way.
__device__ inline void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int later>
__device__ inline void copies_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(later) : "memory");
}

// How many tokens came before: a number, or where it lies on the device. A decode step is recorded once and replayed,
// and the position is what changes from step to step.
struct Position {
    int64 value;
    const int64* device;
    __host__ __device__ Position(int64 v) : value(v), device(nullptr) {}
    __host__ __device__ Position(int64 v, const int64* d) : value(v), device(d) {}
    __device__ int64 get() const { return device ? *device : value; }
};

// ---------------------------------------------------------------------------------------------------------------------
// 3  Embedding: x_r = E[token_r]
// ---------------------------------------------------------------------------------------------------------------------

template <class A>
__global__ void embedding_forward_kernel(A* x, const int32_t* tokens, const float* embed, int64 n, int64 D) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) x[i] = from_float<A>(embed[int64(tokens[i / D]) * D + i % D]);
}
template <class A>
static void embedding_forward(A* x, const int32_t* tokens, const float* embed, int64 rows, int64 D,
                              cudaStream_t stream) {
    launch("embedding_forward", embedding_forward_kernel<A>, ceil_div(rows * D, 256), 256, 0, stream, x, tokens, embed,
           rows * D, D);
}

// dE[token] += sum of dx_r over the rows r of that token, in their order. The host has sorted the rows by token:
// `order` lists them, the rows of the i-th distinct token are order[start[i]] .. order[start[i+1] - 1]. One block per
// distinct token.
template <class A>
__global__ void embedding_backward_kernel(float* dembed, const A* dx, const int32_t* tokens, const int32_t* order,
                                          const int32_t* start, int64 D) {
    const int first = start[blockIdx.x], last = start[blockIdx.x + 1];
    const int64 token = tokens[order[first]];
    for (int64 d = threadIdx.x; d < D; d += blockDim.x) {
        float s = 0;
#pragma unroll 8
        for (int i = first; i < last; ++i) s += to_float(dx[int64(order[i]) * D + d]);
        dembed[token * D + d] += s;
    }
}
template <class A>
static void embedding_backward(float* dembed, const A* dx, const int32_t* tokens, const int32_t* order,
                               const int32_t* start, int64 distinct, int64 D, cudaStream_t stream) {
    launch("embedding_backward", embedding_backward_kernel<A>, distinct, 256, 0, stream, dembed, dx, tokens, order,
           start, D);
}
// The host's part: rows sorted by token (stable), and where each distinct token begins. Returns how many there are.
static int64 sort_by_token(std::vector<int32_t>* order, std::vector<int32_t>* start, const std::vector<int32_t>& tokens,
                           int64 V) {
    std::vector<int32_t> first(size_t(V + 1), 0);
    for (const int32_t t : tokens) ++first[size_t(t) + 1];
    start->clear();
    for (int64 v = 0; v < V; ++v) {
        if (first[size_t(v) + 1] > 0) start->push_back(first[size_t(v)]);
        first[size_t(v) + 1] += first[size_t(v)];
    }
    start->push_back(int32_t(tokens.size()));
    order->resize(tokens.size());
    for (size_t r = 0; r < tokens.size(); ++r) (*order)[size_t(first[size_t(tokens[r])]++)] = int32_t(r);
    return int64(start->size()) - 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4  RMSNorm: rstd = 1 / sqrt(mean(x^2) + eps);  u = x * rstd * w
// ---------------------------------------------------------------------------------------------------------------------
// The kernel of section 8 does it, together with the residual that comes before; alone it has no m.

// ---------------------------------------------------------------------------------------------------------------------
// 5  RoPE: the pair (x_j, x_{j+d/2}) turns by the angle pos * theta^(-2j/d), j < d/2
// ---------------------------------------------------------------------------------------------------------------------
// In place. cos and sin (positions, d/2) come from the host, made in double. One thread turns W pairs.

template <class A, int W>
__global__ void rope_kernel(A* x, const float* cos, const float* sin, int64 n, int64 T, int64 H, int64 half, int64 ld,
                            Position pos0, float sign) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    const int64 j = i % half, head = i / half % H, row = i / half / H, pos = pos0.get() + row % T;
    A* lo = x + row * ld + head * 2 * half + j;
    float a[W], b[W], c[W], s[W], ra[W], rb[W];
    load<W>(a, lo);
    load<W>(b, lo + half);
    load<W>(c, cos + pos * half + j);
    load<W>(s, sin + pos * half + j);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        ra[k] = a[k] * c[k] - sign * b[k] * s[k];
        rb[k] = b[k] * c[k] + sign * a[k] * s[k];
    }
    store<W>(lo, ra);
    store<W>(lo + half, rb);
}
// H heads of d elements, in B*T rows `ld` apart, from position pos0 on; inverse undoes it (= backward).
template <class A>
static void rope(A* x, const float* cos, const float* sin, int64 d, int64 B, int64 T, int64 H, int64 ld, Position pos0,
                 bool inverse, cudaStream_t stream) {
    const int64 half = d / 2, n = B * T * H * half;
    const bool vectors = half % 8 == 0 && ld % 8 == 0 && uintptr_t(x) % 32 == 0;
    launch("rope", vectors ? rope_kernel<A, 8> : rope_kernel<A, 1>, ceil_div(n, vectors ? 2048 : 256), 256, 0, stream,
           x, cos, sin, n, T, H, half, ld, pos0, inverse ? -1.0f : 1.0f);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6  Attention: y_t = sum_{s<=t} p_ts v_s,  p_t = softmax_s(q_t . k_s / sqrt(P))
// ---------------------------------------------------------------------------------------------------------------------
// Tiles of 64 queries by 64 keys; scores exist on chip only. 4 warps, 16 rows each. Tiles wholly in the future are
// skipped. kP is P padded to 64 or 128. Compute-bound: 4 P T^2/2 operations per head against 4 P T numbers moved.

static constexpr int kAttentionTile = 64, kAttentionThreads = 128;
static constexpr int64 kAttentionMaxP = 128;

// One block per tile of queries of one (sequence, head), the longest first. Shared: tiles of q, and of k and v twice,
// so that the next ones arrive while these are worked on. Online softmax: `top` is the largest score so far; when it
// grows, what was summed before is scaled down. Powers of 2 in place of e: scores are multiplied by log2(e) /
// sqrt(P).
template <class A, int kP>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_forward_kernel(A* y, float* lse, const A* q, const A* k, const A* v, AttentionShape n, Position before,
                             float scale) {
    n.S = before.get() + n.T;
    constexpr int kTile = kAttentionTile, ld = kP + kTilePad<A>;
    extern __shared__ __align__(16) unsigned char shared[];
    A* tile_q = reinterpret_cast<A*>(shared);
    A* tiles_kv = tile_q + kTile * ld;  // k, v, k, v
    const int warp = int(threadIdx.x) / 32;
    A* patch = tiles_kv + 4 * kTile * ld + warp * kPatch<A>;
    const int64 heads = n.B * n.H, tiles = (n.T + kTile - 1) / kTile;
    const int64 t0 = (tiles - 1 - blockIdx.x / heads) * kTile, b = blockIdx.x % heads / n.H, h = blockIdx.x % n.H;
    const int64 row0 = b * n.T + t0, first_position = n.S - n.T + t0;
    const int rows = int(min(int64(kTile), n.T - t0));
    const int64 keys = first_position + rows;
    const A* kb = k + b * n.seq_kv + h / (n.H / n.Hkv) * n.P;
    const A* vb = v + b * n.seq_kv + h / (n.H / n.Hkv) * n.P;
    const auto load_keys = [&](int64 s0) {  // of the tile that begins at s0, as one group of copies
        const int count = int(min(int64(kTile), keys - s0));
        A* to = tiles_kv + s0 / kTile % 2 * 2 * kTile * ld;
        if (count > 0) {
            load_tile(to, ld, kb + s0 * n.ld_kv, n.ld_kv, count, kTile, int(n.P), kP);
            load_tile(to + kTile * ld, ld, vb + s0 * n.ld_kv, n.ld_kv, count, kTile, int(n.P), kP);
        }
        copies_commit();
    };
    load_tile(tile_q, ld, q + row0 * n.ld_q + h * n.P, n.ld_q, rows, kTile, int(n.P), kP);
    load_keys(0);
    copies_wait<0>();
    __syncthreads();
    Rows<A, kP> rows_q;
    rows_q.load(tile_q + warp * 16 * ld, ld);
    const float log2_scale = scale * kLog2e;

    Accumulator<kP / 8> out;
    out.zero();
    float top[2] = {-INFINITY, -INFINITY}, z[2] = {0, 0};  // of rows acc_row() and acc_row() + 8
    for (int64 s0 = 0; s0 < keys; s0 += kTile) {
        const A* tile_k = tiles_kv + s0 / kTile % 2 * 2 * kTile * ld;
        load_keys(s0 + kTile);
        copies_wait<1>();
        __syncthreads();  // this tile is there for all
        Accumulator<kTile / 8> score;
        score.zero();
        multiply<Layout::transposed>(score, rows_q, tile_k, ld);
        const int64 position = first_position + warp * 16 + acc_row() - s0;  // keys 0 .. position of this tile are seen
        if (s0 + kTile > first_position + 1)                                 // else the first query sees all of it
#pragma unroll
            for (int t = 0; t < kTile / 8; ++t)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int s = 8 * t + acc_col() + i % 2;
                    if (s > position + i / 2 * 8 || s >= keys - s0) score.v[t][i] = -INFINITY;
                }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float largest = score.v[0][2 * half];
#pragma unroll
            for (int t = 0; t < kTile / 8; ++t)
                largest = fmaxf(largest, fmaxf(score.v[t][2 * half], score.v[t][2 * half + 1]));
            largest = fmaxf(top[half], quad_max(largest) * log2_scale);
            const float shrink = exp2_fast(top[half] - largest);  // the first tile has key 0, which all see: finite
            top[half] = largest;
            z[half] *= shrink;
#pragma unroll
            for (int t = 0; t < kTile / 8; ++t)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) {
                    score.v[t][i] = exp2_fast(score.v[t][i] * log2_scale - largest);
                    z[half] += score.v[t][i];
                }
#pragma unroll
            for (int t = 0; t < kP / 8; ++t) {
                out.v[t][2 * half] *= shrink;
                out.v[t][2 * half + 1] *= shrink;
            }
        }
        Rows<A, kTile> p;
        p.take(score, patch);
        multiply<Layout::plain>(out, p, tile_k + kTile * ld, ld);
        __syncthreads();  // the tile has been read: the copies of the next round may overwrite it
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const float total = quad_sum(z[half]);
        const int t = warp * 16 + acc_row() + 8 * half;
        if (t >= rows) continue;
        if (lane_id() % 4 == 0) lse[(row0 + t) * n.H + h] = top[half] * kLn2 + logf(total);
#pragma unroll
        for (int c = 0; c < kP / 8; ++c)
            if (8 * c + acc_col() < n.P)
                store2(y + (row0 + t) * n.H * n.P + h * n.P + 8 * c + acc_col(), out.v[c][2 * half] / total,
                       out.v[c][2 * half + 1] / total);
    }
}

// The backward, in the reference's letters: p again from lse, dp = dy v^T, dz = p (dp - dy.y) / sqrt(P), then
//     dv = p^T dy     dk = dz^T q     dq = dz k
// Two kernels, so that every output has one owner and no atomics are needed: one owns keys, one owns queries. Both make
// p and dp again, 7 products in place of 5.

// dyy (rows,H) = dy_t . y_t per head, one warp each
template <class A>
__global__ void attention_dot_kernel(float* dyy, const A* dy, const A* y, int64 n, int64 P) {
    const int64 i = int64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (i >= n) return;
    float s = 0;
    for (int64 p = lane_id(); p < P; p += 32) s += to_float(dy[i * P + p]) * to_float(y[i * P + p]);
    s = warp_sum(s);
    if (lane_id() == 0) dyy[i] = s;
}

// One block per tile of keys of one (sequence, key/value head); it walks over the heads of the group and the queries
// from the diagonal on. Rows of the accumulators are keys, columns are queries.
template <class A, int kP>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_backward_kv_kernel(A* dk, A* dv, const A* dy, const A* q, const A* k, const A* v, const float* lse,
                                 const float* dyy, AttentionShape n, float scale) {
    constexpr int kTile = kAttentionTile, ld = kP + kTilePad<A>;
    extern __shared__ __align__(16) unsigned char shared[];
    A* tile_k = reinterpret_cast<A*>(shared);
    A* tile_v = tile_k + kTile * ld;
    A* tile_q = tile_v + kTile * ld;
    A* tile_dy = tile_q + kTile * ld;
    const int warp = int(threadIdx.x) / 32;
    A* patch = tile_dy + kTile * ld + warp * kPatch<A>;
    float* tile_lse = reinterpret_cast<float*>(tile_dy + kTile * ld + 4 * kPatch<A>);  // in powers of 2
    float* tile_dyy = tile_lse + kTile;
    const int64 heads = n.B * n.Hkv, group = n.H / n.Hkv;
    const int64 s0 = blockIdx.x / heads * kTile, b = blockIdx.x % heads / n.Hkv, hkv = blockIdx.x % n.Hkv;
    const int count = int(min(int64(kTile), n.S - s0));
    const int64 kv0 = b * n.seq_kv + s0 * n.ld_kv + hkv * n.P;
    load_tile(tile_k, ld, k + kv0, n.ld_kv, count, kTile, int(n.P), kP);
    load_tile(tile_v, ld, v + kv0, n.ld_kv, count, kTile, int(n.P), kP);
    const float log2_scale = scale * kLog2e;

    Accumulator<kP / 8> acc_dk, acc_dv;
    acc_dk.zero();
    acc_dv.zero();
    const int64 diagonal = max(int64(0), s0 - (n.S - n.T)) / kTile * kTile;  // the first tile of queries that see s0
    for (int64 h = hkv * group; h < (hkv + 1) * group; ++h)
        for (int64 t0 = diagonal; t0 < n.T; t0 += kTile) {
            const int rows = int(min(int64(kTile), n.T - t0));
            const int64 row0 = b * n.T + t0;
            __syncthreads();  // the tiles of the round before have been read
            load_tile(tile_q, ld, q + row0 * n.ld_q + h * n.P, n.ld_q, rows, kTile, int(n.P), kP);
            load_tile(tile_dy, ld, dy + (row0 * n.H + h) * n.P, n.H * n.P, rows, kTile, int(n.P), kP);
            for (int t = int(threadIdx.x); t < kTile; t += kAttentionThreads) {  // past the end: p = 2^-inf = 0
                tile_lse[t] = t < rows ? lse[(row0 + t) * n.H + h] * kLog2e : INFINITY;
                tile_dyy[t] = t < rows ? dyy[(row0 + t) * n.H + h] : 0;
            }
            copies_done();
            __syncthreads();
            Accumulator<kTile / 8> p, dz;
            p.zero();
            multiply<Layout::plain, Layout::transposed>(p, tile_k + warp * 16 * ld, ld, tile_q, ld, kP);
            const int64 first_position = n.S - n.T + t0 - s0;  // query t of the tile sees keys 0 .. first_position + t
            const bool whole = first_position >= kTile - 1;    // all queries see all keys of the tile
#pragma unroll
            for (int c = 0; c < kTile / 8; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const int t = 8 * c + acc_col() + i % 2;
                    p.v[c][i] = exp2_fast(p.v[c][i] * log2_scale - tile_lse[t]);
                    if (!whole && warp * 16 + acc_row() + i / 2 * 8 > first_position + t) p.v[c][i] = 0;
                }
            Rows<A, kTile> operand;
            operand.take(p, patch);
            multiply<Layout::plain>(acc_dv, operand, tile_dy, ld);
            dz.zero();
            multiply<Layout::plain, Layout::transposed>(dz, tile_v + warp * 16 * ld, ld, tile_dy, ld, kP);
#pragma unroll
            for (int c = 0; c < kTile / 8; ++c)
#pragma unroll
                for (int i = 0; i < 4; ++i) dz.v[c][i] = p.v[c][i] * (dz.v[c][i] - tile_dyy[8 * c + acc_col() + i % 2]);
            operand.take(dz, patch);
            multiply<Layout::plain>(acc_dk, operand, tile_q, ld);
        }
    copies_done();  // of k and v, if no query followed
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int s = warp * 16 + acc_row() + 8 * half;
        if (s >= count) continue;
#pragma unroll
        for (int c = 0; c < kP / 8; ++c)
            if (8 * c + acc_col() < n.P) {
                const int64 at = kv0 + s * n.ld_kv + 8 * c + acc_col();
                store2(dk + at, acc_dk.v[c][2 * half] * scale, acc_dk.v[c][2 * half + 1] * scale);
                store2(dv + at, acc_dv.v[c][2 * half], acc_dv.v[c][2 * half + 1]);
            }
    }
}

// One block per tile of queries of one (sequence, head). Rows of the accumulators are queries, columns are keys.
template <class A, int kP>
__global__ void __launch_bounds__(kAttentionThreads)
    attention_backward_q_kernel(A* dq, const A* dy, const A* q, const A* k, const A* v, const float* lse,
                                const float* dyy, AttentionShape n, float scale) {
    constexpr int kTile = kAttentionTile, ld = kP + kTilePad<A>;
    extern __shared__ __align__(16) unsigned char shared[];
    A* tile_q = reinterpret_cast<A*>(shared);
    A* tile_dy = tile_q + kTile * ld;
    A* tile_k = tile_dy + kTile * ld;
    A* tile_v = tile_k + kTile * ld;
    const int warp = int(threadIdx.x) / 32;
    A* patch = tile_v + kTile * ld + warp * kPatch<A>;
    const int64 heads = n.B * n.H, tiles = (n.T + kTile - 1) / kTile;
    const int64 t0 = (tiles - 1 - blockIdx.x / heads) * kTile, b = blockIdx.x % heads / n.H, h = blockIdx.x % n.H;
    const int64 row0 = b * n.T + t0, first_position = n.S - n.T + t0;
    const int rows = int(min(int64(kTile), n.T - t0));
    const int64 keys = first_position + rows, kv0 = b * n.seq_kv + h / (n.H / n.Hkv) * n.P;
    load_tile(tile_q, ld, q + row0 * n.ld_q + h * n.P, n.ld_q, rows, kTile, int(n.P), kP);
    load_tile(tile_dy, ld, dy + (row0 * n.H + h) * n.P, n.H * n.P, rows, kTile, int(n.P), kP);
    const float log2_scale = scale * kLog2e;
    float l[2], d[2];  // of rows acc_row() and acc_row() + 8
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = warp * 16 + acc_row() + 8 * half;
        l[half] = t < rows ? lse[(row0 + t) * n.H + h] * kLog2e : INFINITY;
        d[half] = t < rows ? dyy[(row0 + t) * n.H + h] : 0;
    }
    Accumulator<kP / 8> out;
    out.zero();
    for (int64 s0 = 0; s0 < keys; s0 += kTile) {
        const int count = int(min(int64(kTile), keys - s0));
        __syncthreads();
        load_tile(tile_k, ld, k + kv0 + s0 * n.ld_kv, n.ld_kv, count, kTile, int(n.P), kP);
        load_tile(tile_v, ld, v + kv0 + s0 * n.ld_kv, n.ld_kv, count, kTile, int(n.P), kP);
        copies_done();
        __syncthreads();
        Accumulator<kTile / 8> z, dz;
        z.zero();
        dz.zero();
        multiply<Layout::plain, Layout::transposed>(z, tile_q + warp * 16 * ld, ld, tile_k, ld, kP);
        multiply<Layout::plain, Layout::transposed>(dz, tile_dy + warp * 16 * ld, ld, tile_v, ld, kP);
        const int64 position = first_position + warp * 16 + acc_row() - s0;
        const bool whole = s0 + kTile <= first_position + 1;  // the first query sees all of the tile
#pragma unroll
        for (int c = 0; c < kTile / 8; ++c)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float p = exp2_fast(z.v[c][i] * log2_scale - l[i / 2]);
                dz.v[c][i] = p * (dz.v[c][i] - d[i / 2]);
                if (!whole && 8 * c + acc_col() + i % 2 > position + i / 2 * 8) dz.v[c][i] = 0;
            }
        Rows<A, kTile> operand;
        operand.take(dz, patch);
        multiply<Layout::plain>(out, operand, tile_k, ld);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int t = warp * 16 + acc_row() + 8 * half;
        if (t >= rows) continue;
#pragma unroll
        for (int c = 0; c < kP / 8; ++c)
            if (8 * c + acc_col() < n.P)
                store2(dq + (row0 + t) * n.ld_q + h * n.P + 8 * c + acc_col(), out.v[c][2 * half] * scale,
                       out.v[c][2 * half + 1] * scale);
    }
}

template <class A>
static size_t attention_shared(int tiles, int kP) {
    return sizeof(A) * size_t(kAttentionTile * tiles * (kP + kTilePad<A>)+4 * kPatch<A>) +
           2 * kAttentionTile * sizeof(float);
}
template <class A, int kP>
static void attention_forward_padded(A* y, float* lse, const A* q, const A* k, const A* v, const AttentionShape& n,
                                     Position before, cudaStream_t stream) {
    launch("attention_forward", attention_forward_kernel<A, kP>, ceil_div(n.T, kAttentionTile) * n.B * n.H,
           kAttentionThreads, attention_shared<A>(5, kP), stream, y, lse, q, k, v, n, before,
           float(1 / std::sqrt(double(n.P))));
}
// `before` keys come before the first query: n.S is before + T.
template <class A>
static void attention_forward(A* y, float* lse, const A* q, const A* k, const A* v, const AttentionShape& n,
                              Position before, cudaStream_t stream) {
    if (n.P <= 64) attention_forward_padded<A, 64>(y, lse, q, k, v, n, before, stream);
    else attention_forward_padded<A, 128>(y, lse, q, k, v, n, before, stream);
}
template <class A, int kP>
static void attention_backward_padded(A* dq, A* dk, A* dv, float* dyy, const A* dy, const A* q, const A* k, const A* v,
                                      const A* y, const float* lse, const AttentionShape& n, cudaStream_t stream) {
    const float scale = float(1 / std::sqrt(double(n.P)));
    launch("attention_backward", attention_dot_kernel<A>, ceil_div(n.B * n.T * n.H, 8), 256, 0, stream, dyy, dy, y,
           n.B * n.T * n.H, n.P);
    launch("attention_backward", attention_backward_kv_kernel<A, kP>, ceil_div(n.S, kAttentionTile) * n.B * n.Hkv,
           kAttentionThreads, attention_shared<A>(4, kP), stream, dk, dv, dy, q, k, v, lse, dyy, n, scale);
    launch("attention_backward", attention_backward_q_kernel<A, kP>, ceil_div(n.T, kAttentionTile) * n.B * n.H,
           kAttentionThreads, attention_shared<A>(4, kP), stream, dq, dy, q, k, v, lse, dyy, n, scale);
}
// dyy (rows,H) is scratch.
template <class A>
static void attention_backward(A* dq, A* dk, A* dv, float* dyy, const A* dy, const A* q, const A* k, const A* v,
                               const A* y, const float* lse, const AttentionShape& n, cudaStream_t stream) {
    if (n.P <= 64) attention_backward_padded<A, 64>(dq, dk, dv, dyy, dy, q, k, v, y, lse, n, stream);
    else attention_backward_padded<A, 128>(dq, dk, dv, dyy, dy, q, k, v, y, lse, n, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// 7  SSD: S_t = a_t S_{t-1} + dt_t X_t (x) B_t,  Y_t = S_t C_t,  a_t = exp(dA_t)
// ---------------------------------------------------------------------------------------------------------------------

__device__ inline float softplus(float z) { return z > 20 ? z : log1pf(expf(z)); }

// dt = softplus(dt_raw + dt_bias), dA = -exp(A_log) dt
template <class A>
__global__ void ssd_dt_forward_kernel(float* dt, float* dA, const A* dt_raw, const float* dt_bias, const float* A_log,
                                      bool decay, int64 n, int64 H, int64 ld) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64 r = i / H, h = i % H;
    dt[i] = softplus(to_float(dt_raw[r * ld + h]) + dt_bias[h]);
    dA[i] = decay ? -expf(A_log[h]) * dt[i] : 0.0f;
}
template <class A>
static void ssd_dt_forward(float* dt, float* dA, const A* dt_raw, const float* dt_bias, const float* A_log, bool decay,
                           int64 rows, int64 H, int64 ld, cudaStream_t stream) {
    launch("ssd_dt_forward", ssd_dt_forward_kernel<A>, ceil_div(rows * H, 256), 256, 0, stream, dt, dA, dt_raw, dt_bias,
           A_log, decay, rows * H, H, ld);
}

// Each block takes `block_rows` rows, one thread per head (and again, H threads at a time, if there are more heads).
// partial (blocks, 2H): sums for dt_bias | A_log. `pad` elements after each row of ddt_raw are set to zero: they are
// read by a matrix product whose inner dimension is padded.
template <class A>
__global__ void ssd_dt_backward_kernel(A* ddt_raw, float* partial, const float* ddt, const float* ddA, const A* dt_raw,
                                       const float* dt_bias, const float* A_log, const float* dA, bool decay,
                                       int64 rows, int64 H, int64 ld, int64 pad, int64 block_rows) {
    const int64 first = blockIdx.x * block_rows, last = min(rows, first + block_rows);
    for (int64 h = threadIdx.x; h < H + pad; h += blockDim.x) {
        if (h >= H) {
            for (int64 r = first; r < last; ++r) ddt_raw[r * ld + h] = from_float<A>(0.0f);
            continue;
        }
        const float a = decay ? -expf(A_log[h]) : 0.0f;
        float bias = 0, log = 0;
#pragma unroll 4
        for (int64 r = first; r < last; ++r) {
            const int64 i = r * H + h;
            const float z = to_float(dt_raw[r * ld + h]) + dt_bias[h];
            const float dz = (ddt[i] + a * ddA[i]) / (1.0f + expf(-z));
            ddt_raw[r * ld + h] = from_float<A>(dz);
            bias += dz;
            log += ddA[i] * dA[i];
        }
        partial[blockIdx.x * 2 * H + h] = bias;
        partial[blockIdx.x * 2 * H + H + h] = decay ? log : 0.0f;
    }
}
template <class A>
static void ssd_dt_backward(A* ddt_raw, float* ddt_bias, float* dA_log, float* partial, const float* ddt,
                            const float* ddA, const A* dt_raw, const float* dt_bias, const float* A_log,
                            const float* dA, bool decay, int64 rows, int64 H, int64 ld, int64 pad,
                            cudaStream_t stream) {
    const int64 block_rows = ceil_div(rows, kPartialBlocks), blocks = ceil_div(rows, block_rows);
    launch("ssd_dt_backward", ssd_dt_backward_kernel<A>, blocks, int(std::min<int64>(256, round_up(H + pad, 32))), 0,
           stream, ddt_raw, partial, ddt, ddA, dt_raw, dt_bias, A_log, dA, decay, rows, H, ld, pad, block_rows);
    add_partials(ddt_bias, dA_log, partial, blocks, 2 * H, H, stream);
}

// ---- 7a  Recurrent: one token, in section 11b

// ---- 7c  Chunked ------------------------------------------------------------------------------------------------------
// One block of 8 warps sweeps the chunks of one (sequence, head), or of a segment of them. The state stays in
// registers: it is cut into units of 16 x 32 numbers, and unit u belongs to warp u % 8 for the whole sweep. C, B, X
// are read once, Y is written once, and no Q x Q matrix leaves the chip. The chunk length is this kernel's own
// (SsdTiles::q), since the result does not depend on it; config.Q is for the reference. The backward needs S_in of
// every chunk: chunk_states (B,H,chunks,P,N) in fp32.
//
// Tiles are padded: N and P to multiples of 32. A token past the end has C = B = X = 0, dt = 0, dA = 0: it changes
// nothing. kN and kP, where not 0, fix N and P at compile time, which saves index arithmetic and tests of edges.

static constexpr int kSsdWarps = 8, kSsdThreads = 256;

struct SsdTiles {
    int q, N, P;  // chunk length, padded N, padded P
    int units() const { return P / 16 * (N / 32); }
};

// Shared memory of the sweeps, in bytes. Vectors are of q floats.
template <class A>
static size_t ssd_shared(const SsdTiles& t, bool backward) {
    const size_t pad = size_t(kTilePad<A>), q = size_t(t.q), N = size_t(t.N), P = size_t(t.P);
    const size_t tiles = (backward ? 2 : 3) * q * (N + pad) + 2 * q * (P + pad) + (backward ? 2 : 1) * P * (N + pad) +
                         (backward ? 2 : 1) * q * (q + pad);
    const size_t vectors = backward ? 4 + 2 * (N / 32) + P / 32 : 8;
    return sizeof(A) * tiles + sizeof(float) * (vectors * q + 16);
}
// The longest chunk whose tiles fit. The same for forward and backward: both index chunk_states.
template <class A>
static SsdTiles ssd_tiles(int64 N, int64 P) {
    const size_t limit = 227 * 1024;  // what a block of compute capability 9.0 may have
    int device = 0, most = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    for (const int q : {64, 32}) {
        if (N > 512 || P > 512) break;
        const SsdTiles t{q, int(round_up(N, 32)), int(round_up(P, 32))};
        if (t.units() <= 8 * kSsdWarps &&
            std::max(ssd_shared<A>(t, true), ssd_shared<A>(t, false)) <= std::min(limit, size_t(most)))
            return t;
    }
    fail("SSD: a state of P %lld x N %lld per head is too large for this GPU's on-chip memory (%d KB) in %s",
         (long long)P, (long long)N, most / 1024, sizeof(A) == 2 ? "bf16" : "fp32");
}
static int64 ssd_chunks(const SsdTiles& t, int64 T) { return ceil_div(T, t.q); }

// Warp 0: chunk_cumsum and what follows from it. cs_t inclusive; from_in = exp(cs_t); to_end = exp(cs_last - cs_t).
__device__ inline void chunk_cumsum(float* cs, float* step, float* from_in, float* to_end, const float* dt,
                                    const float* dA, int64 row0, int64 h, int64 H, int valid, int q) {
    float before = 0;
    for (int t0 = 0; t0 < q; t0 += 32) {
        const int t = t0 + lane_id();
        float sum = t < valid ? dA[(row0 + t) * H + h] : 0.0f;
        for (int d = 1; d < 32; d *= 2) {
            const float left = __shfl_up_sync(~0u, sum, d);
            if (lane_id() >= d) sum += left;
        }
        sum += before;
        before = __shfl_sync(~0u, sum, 31);
        cs[t] = sum;
        step[t] = t < valid ? dt[(row0 + t) * H + h] : 0.0f;
    }
    for (int t = lane_id(); t < q; t += 32) {
        from_in[t] = expf(cs[t]);
        to_end[t] = expf(before - cs[t]);
    }
}
// decay(t,s): subtract, mask, then exp
__device__ inline float chunk_decay(const float* cs, int t, int s) {
    return s <= t ? exp2_fast((cs[t] - cs[s]) * kLog2e) : 0.0f;
}

// The steps of one chunk, in the letters of docs/ssd.md:
//     G   = M o C B^T dt              (q,q)      rows in strips of 16, columns in groups of 32; nothing above the diagonal
//     Y   = from_in S_in C + G X      (q,P)
//     S   = exp(cs_last) S + (to_end dt X)^T B   (P,N)
template <class A, int SU, int kN, int kP, bool kStateOnly>
__global__ void __launch_bounds__(kSsdThreads, kN && sizeof(A) == 2 ? 2 : 1)
    ssd_forward_kernel(A* Y, float* S_T, float* chunk_states, const A* sc, const A* sb, const A* sx, const float* dt,
                       const float* dA, const float* S_0, float* log_decays, SsdShape n, SsdTiles tiles,
                       int64 segments) {
    const int q = kN ? 64 : tiles.q, N = kN ? kN : tiles.N, P = kP ? kP : tiles.P;  // of the tiles
    const int real_N = kN ? kN : int(n.N), real_P = kP ? kP : int(n.P);             // of the matrices
    const int ldn = N + kTilePad<A>, ldp = P + kTilePad<A>, ldq = q + kTilePad<A>;
    extern __shared__ __align__(16) unsigned char shared[];
    A* C = reinterpret_cast<A*>(shared);                     // (q,N)
    A* Bs = C + q * ldn;                                     // (q,N) twice: chunks take turns
    A* X = Bs + 2 * q * ldn;                                 // (q,P)
    A* Xs = X + q * ldp;                                     // (q,P) to_end dt X
    A* S = Xs + q * ldp;                                     // (P,N) the state as an operand
    A* G = S + P * ldn;                                      // (q,q)
    float* vectors = reinterpret_cast<float*>(G + q * ldq);  // cs, step, from_in, to_end (q), twice

    const int warp = int(threadIdx.x) / 32, strips = P / 16, units = strips * (N / 32);
    const int64 bh = blockIdx.x / segments, segment = blockIdx.x % segments, b = bh / n.H, h = bh % n.H;
    const int64 PN = int64(real_P) * real_N, chunks = (n.T + q - 1) / q,
                per_segment = (chunks + segments - 1) / segments;
    const int64 first_chunk = segment * per_segment, end_chunk = min(chunks, first_chunk + per_segment);
    // The rows and columns of state unit i of this warp.
    const auto unit_row = [&](int i) { return (warp + kSsdWarps * i) % strips * 16; };
    const auto unit_col = [&](int i) { return (warp + kSsdWarps * i) / strips * 32; };
    const auto mine = [&](int i) { return warp + kSsdWarps * i < units; };
    Accumulator<4> state[SU];
    // Calls f(element index in the real (P,N) matrix, tile offset, value 0, value 1) for each pair that this thread
    // has.
    const auto for_pairs = [&](int i, auto f) {
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const int p = unit_row(i) + acc_row() + 4 * j, k = unit_col(i) + 8 * t + acc_col();
                f(p < real_P && k < real_N, p * real_N + k, p * ldn + k, state[i].v[t][j], state[i].v[t][j + 1]);
            }
    };
#pragma unroll
    for (int i = 0; i < SU; ++i) {
        state[i].zero();
        if (mine(i))
            for_pairs(i, [&](bool inside, int at, int tile_at, float& s0, float& s1) {
                if (S_0 && inside) {
                    s0 = S_0[blockIdx.x * PN + at];
                    s1 = S_0[blockIdx.x * PN + at + 1];
                }
                store2(S + tile_at, s0, s1);
            });
    }
    // Begins to bring a chunk's tiles and vectors. C, X: nobody may need the last ones any more.
    const auto fetch = [&](int64 chunk) {
        if (chunk >= end_chunk) return;
        const int64 row0 = b * n.T + chunk * q;
        const int valid = int(min(int64(q), n.T - chunk * q)), turn = int(chunk % 2);
        if (!kStateOnly) load_tile(C, ldn, sc + row0 * n.ld + h * real_N, n.ld, valid, q, real_N, N);
        load_tile(Bs + turn * q * ldn, ldn, sb + row0 * n.ld + h * real_N, n.ld, valid, q, real_N, N);
        load_tile(X, ldp, sx + row0 * n.ld + h * real_P, n.ld, valid, q, real_P, P);
        float* at = vectors + turn * 4 * q;
        if (warp == 0) chunk_cumsum(at, at + q, at + 2 * q, at + 3 * q, dt, dA, row0, h, n.H, valid, q);
    };
    float log_decay = 0;  // of the whole segment
    fetch(first_chunk);
    copies_done();
    __syncthreads();  // tiles, vectors and the state operand are complete
    for (int64 chunk = first_chunk; chunk < end_chunk; ++chunk) {
        const int64 t0 = chunk * q, row0 = b * n.T + t0;
        const int valid = int(min(int64(q), n.T - t0));
        const A* Bt = Bs + chunk % 2 * q * ldn;
        const float *cs = vectors + chunk % 2 * 4 * q, *step = cs + q, *from_in = step + q, *to_end = from_in + q;
        if (chunk_states)
#pragma unroll
            for (int i = 0; i < SU; ++i)
                if (mine(i))
                    for_pairs(i, [&](bool inside, int at, int, float& s0, float& s1) {
                        if (inside) store2(chunk_states + (bh * chunks + chunk) * PN + at, s0, s1);
                    });
        log_decay += cs[q - 1];
        for (int u = kStateOnly ? INT_MAX / 2 : warp; u < q / 16 * (q / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32;
            if (col > row) continue;  // wholly above the diagonal (row and col are not read there)
            Accumulator<4> g;
            g.zero();
            multiply<Layout::plain, Layout::transposed>(g, C + row * ldn, ldn, Bt + col * ldn, ldn, N);
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    const int r = row + acc_row() + 4 * j, s = col + 8 * t + acc_col();
                    store2(G + r * ldq + s, chunk_decay(cs, r, s) * g.v[t][j] * step[s],
                           chunk_decay(cs, r, s + 1) * g.v[t][j + 1] * step[s + 1]);
                }
        }
        for (int i = 2 * int(threadIdx.x); i < q * P; i += 2 * kSsdThreads) {
            const int s = i / P, p = i % P;
            float x[2];
            load<2>(x, X + s * ldp + p);
            const float f = to_end[s] * step[s];
            store2(Xs + s * ldp + p, f * x[0], f * x[1]);
        }
        __syncthreads();  // G and Xs are complete
        for (int u = kStateOnly ? INT_MAX / 2 : warp; u < q / 16 * (P / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32;
            Accumulator<4> y;
            y.zero();
            multiply<Layout::plain, Layout::transposed>(y, C + row * ldn, ldn, S + col * ldn, ldn, N);
            y.scale_rows(from_in[row + acc_row()], from_in[row + acc_row() + 8]);
            multiply<Layout::plain, Layout::plain>(y, G + row * ldq, ldq, X + col, ldp, row + 16);
#pragma unroll
            for (int t = 0; t < 4; ++t)
#pragma unroll
                for (int j = 0; j < 4; j += 2) {
                    const int r = row + acc_row() + 4 * j, p = col + 8 * t + acc_col();
                    if (r < valid && p < real_P)
                        store2(Y + ((row0 + r) * n.H + h) * real_P + p, y.v[t][j], y.v[t][j + 1]);
                }
        }
        __syncthreads();  // C, X and the state operand have been read
        fetch(chunk + 1);
        const float all = from_in[q - 1];
#pragma unroll
        for (int i = 0; i < SU; ++i)
            if (mine(i)) {
                state[i].scale_rows(all, all);
                multiply<Layout::transposed, Layout::plain>(state[i], Xs + unit_row(i), ldp, Bt + unit_col(i), ldn, q);
                for_pairs(i, [&](bool, int, int tile_at, float& s0, float& s1) { store2(S + tile_at, s0, s1); });
            }
        copies_done();
        __syncthreads();  // the next chunk's tiles and vectors and the state operand are complete; Xs has been read
    }
    if (kStateOnly && threadIdx.x == 0) log_decays[blockIdx.x] = log_decay;
    if (kStateOnly || (S_T && segment == segments - 1))
#pragma unroll
        for (int i = 0; i < SU; ++i)
            if (mine(i))
                for_pairs(i, [&](bool inside, int at, int, float& s0, float& s1) {
                    if (inside) store2(S_T + (kStateOnly ? int64(blockIdx.x) : bh) * PN + at, s0, s1);
                });
}

// The chunks in reverse; dS, in registers, is the gradient of S_out, then of S_in:
//     E    = dY X^T;  MG = M o C B^T;  ME = M o E dt                                   (q,q)
//     dB   = to_end dt X dS + ME^T C                                                   (q,N)
//     dXd  = to_end B dS^T + MG^T dY;   dX = dt dXd;  ddt = X . dXd                    (q,P)
//     dC   = from_in dY S_in + ME B                                                    (q,N)
//     dS   = exp(cs_last) dS + (from_in dY)^T C                                        (P,N)
//     dcs_t = C_t . dC_t - B_t . dB_t;   ddA_u = sum_{t>=u} dcs_t + <S_out, dS>
//     <S_out, dS> = exp(cs_last) <S_in, dS> + sum_s B_s . (the state's part of dB_s)
// The dot products use dC and dB in fp32, before they are rounded to A. Sums over the columns of a row come from
// several units: each writes its own part, and they are added up in order.
template <class A, int SU, int kN, int kP, bool kStateOnly>
__global__ void __launch_bounds__(kSsdThreads, kN && sizeof(A) == 2 ? 2 : 1)
    ssd_backward_kernel(A* dsc, A* dsb, A* dsx, float* ddt, float* ddA, float* dS_0, const A* dY, const float* dS_T,
                        const A* sc, const A* sb, const A* sx, const float* dt, const float* dA,
                        const float* chunk_states, float* log_decays, SsdShape n, SsdTiles tiles, int64 segments) {
    const int q = kN ? 64 : tiles.q, N = kN ? kN : tiles.N, P = kP ? kP : tiles.P;  // of the tiles
    const int real_N = kN ? kN : int(n.N), real_P = kP ? kP : int(n.P);             // of the matrices
    const int ldn = N + kTilePad<A>, ldp = P + kTilePad<A>, ldq = q + kTilePad<A>;
    extern __shared__ __align__(16) unsigned char shared[];
    A* C = reinterpret_cast<A*>(shared);  // (q,N)
    A* Bt = C + q * ldn;                  // (q,N)
    A* X = Bt + q * ldn;                  // (q,P)
    A* dy = X + q * ldp;                  // (q,P)
    A* S = dy + q * ldp;                  // (P,N) S_in as an operand
    A* dS = S + P * ldn;                  // (P,N) dS as an operand
    A* MG = dS + P * ldn;                 // (q,q)
    A* ME = MG + q * ldq;                 // (q,q)
    float* cs = reinterpret_cast<float*>(ME + q * ldq);
    float *step = cs + q, *from_in = step + q, *to_end = from_in + q;
    float* C_dC = to_end + q;              // (N/32, q) parts of C_t . dC_t
    float* B_dB = C_dC + N / 32 * q;       // (N/32, q)
    float* X_dXd = B_dB + N / 32 * q;      // (P/32, q)
    float* S_dot_dS = X_dXd + P / 32 * q;  // (8) parts of <S_out, dS>, one per warp

    const int warp = int(threadIdx.x) / 32, strips = P / 16, units = strips * (N / 32);
    const int64 bh = blockIdx.x / segments, segment = blockIdx.x % segments, b = bh / n.H, h = bh % n.H;
    const int64 PN = int64(real_P) * real_N, chunks = (n.T + q - 1) / q,
                per_segment = (chunks + segments - 1) / segments;
    const int64 first_chunk = segment * per_segment, end_chunk = min(chunks, first_chunk + per_segment);
    const auto unit_row = [&](int i) { return (warp + kSsdWarps * i) % strips * 16; };
    const auto unit_col = [&](int i) { return (warp + kSsdWarps * i) / strips * 32; };
    const auto mine = [&](int i) { return warp + kSsdWarps * i < units; };
    Accumulator<4> state[SU];
    const auto for_pairs = [&](int i, auto f) {
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const int p = unit_row(i) + acc_row() + 4 * j, k = unit_col(i) + 8 * t + acc_col();
                f(p < real_P && k < real_N, p * real_N + k, p * ldn + k, state[i].v[t][j], state[i].v[t][j + 1]);
            }
    };
    // Row sums of an output unit times the tile it belongs to, over the unit's 32 columns, into part[row].
    const auto row_dots = [&](float* part, const Accumulator<4>& acc, const A* tile, int ld, int row, int col) {
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const int r = row + acc_row() + 4 * j;
            float s = 0;
#pragma unroll
            for (int t = 0; t < 4; ++t) {
                float f[2];
                load<2>(f, tile + r * ld + col + 8 * t + acc_col());
                s += acc.v[t][j] * f[0] + acc.v[t][j + 1] * f[1];
            }
            s = quad_sum(s);
            if (lane_id() % 4 == 0) part[r] = s;
        }
    };
    // Writes an output unit to rows `ld` apart.
    const auto write = [&](A* to, int64 ld, const Accumulator<4>& acc, int row, int col, int valid, int width) {
#pragma unroll
        for (int t = 0; t < 4; ++t)
#pragma unroll
            for (int j = 0; j < 4; j += 2) {
                const int r = row + acc_row() + 4 * j, c = col + 8 * t + acc_col();
                if (r < valid && c < width) store2(to + r * ld + c, acc.v[t][j], acc.v[t][j + 1]);
            }
    };
#pragma unroll
    for (int i = 0; i < SU; ++i) {
        state[i].zero();
        if (mine(i))
            for_pairs(i, [&](bool inside, int at, int tile_at, float& s0, float& s1) {
                if (dS_T && inside) {
                    s0 = dS_T[blockIdx.x * PN + at];
                    s1 = dS_T[blockIdx.x * PN + at + 1];
                }
                store2(dS + tile_at, s0, s1);
            });
    }
    float log_decay = 0;  // of the whole segment
    for (int64 chunk = end_chunk - 1; chunk >= first_chunk; --chunk) {
        const int64 t0 = chunk * q, row0 = b * n.T + t0;
        const int valid = int(min(int64(q), n.T - t0));
        const int64 c0 = row0 * n.ld + h * real_N, x0 = row0 * n.ld + h * real_P;
        load_tile(C, ldn, sc + c0, n.ld, valid, q, real_N, N);
        if (!kStateOnly) {
            load_tile(Bt, ldn, sb + c0, n.ld, valid, q, real_N, N);
            load_tile(X, ldp, sx + x0, n.ld, valid, q, real_P, P);
        }
        load_tile(dy, ldp, dY + (row0 * n.H + h) * real_P, n.H * real_P, valid, q, real_P, P);
        if (warp == 0) chunk_cumsum(cs, step, from_in, to_end, dt, dA, row0, h, n.H, valid, q);
        float from_in_dot = 0, new_dot = 0;  // this thread's parts of <S_in, dS> and of the sum over B_s . dB_s
#pragma unroll
        for (int i = 0; i < SU; ++i)
            if (!kStateOnly && mine(i))
                for_pairs(i, [&](bool inside, int at, int tile_at, float& s0, float& s1) {
                    float s[2] = {0, 0};
                    if (inside) load<2>(s, chunk_states + (bh * chunks + chunk) * PN + at);
                    from_in_dot += s[0] * s0 + s[1] * s1;
                    store2(S + tile_at, s[0], s[1]);
                });
        copies_done();
        __syncthreads();  // tiles, vectors, S and dS are complete
        if (!kStateOnly) {
            for (int u = warp; u < q / 16 * (q / 32); u += kSsdWarps) {
                const int row = u % (q / 16) * 16, col = u / (q / 16) * 32;
                Accumulator<4> g, e;
                g.zero();
                e.zero();
                if (col <= row + 15) {
                    multiply<Layout::plain, Layout::transposed>(g, C + row * ldn, ldn, Bt + col * ldn, ldn, N);
                    multiply<Layout::plain, Layout::transposed>(e, dy + row * ldp, ldp, X + col * ldp, ldp, P);
                }
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int j = 0; j < 4; j += 2) {
                        const int r = row + acc_row() + 4 * j, s = col + 8 * t + acc_col();
                        const float m0 = chunk_decay(cs, r, s), m1 = chunk_decay(cs, r, s + 1);
                        store2(MG + r * ldq + s, m0 * g.v[t][j], m1 * g.v[t][j + 1]);
                        store2(ME + r * ldq + s, m0 * e.v[t][j] * step[s], m1 * e.v[t][j + 1] * step[s + 1]);
                    }
            }
            __syncthreads();  // MG and ME are complete
            // The rows of an output strip meet rows t >= row of MG and ME (transposed products) or columns s <= row +
            // 15.
            for (int u = warp; u < q / 16 * (N / 32); u += kSsdWarps) {
                const int row = u % (q / 16) * 16, col = u / (q / 16) * 32, r0 = row + acc_row(), r1 = r0 + 8;
                Accumulator<4> acc;
                acc.zero();  // dB
                multiply<Layout::plain, Layout::plain>(acc, X + row * ldp, ldp, dS + col, ldn, P);
                acc.scale_rows(to_end[r0] * step[r0], to_end[r1] * step[r1]);
#pragma unroll
                for (int t = 0; t < 4; ++t)
#pragma unroll
                    for (int j = 0; j < 4; j += 2) {
                        float f[2];
                        load<2>(f, Bt + (r0 + 4 * j) * ldn + col + 8 * t + acc_col());
                        new_dot += acc.v[t][j] * f[0] + acc.v[t][j + 1] * f[1];
                    }
                multiply<Layout::transposed, Layout::plain>(acc, ME + row * ldq + row, ldq, C + row * ldn + col, ldn,
                                                            q - row);
                row_dots(B_dB + col / 32 * q, acc, Bt, ldn, row, col);
                write(dsb + c0, n.ld, acc, row, col, valid, real_N);
                acc.zero();  // dC
                multiply<Layout::plain, Layout::plain>(acc, dy + row * ldp, ldp, S + col, ldn, P);
                acc.scale_rows(from_in[r0], from_in[r1]);
                multiply<Layout::plain, Layout::plain>(acc, ME + row * ldq, ldq, Bt + col, ldn, row + 16);
                row_dots(C_dC + col / 32 * q, acc, C, ldn, row, col);
                write(dsc + c0, n.ld, acc, row, col, valid, real_N);
            }
            for (int u = warp; u < q / 16 * (P / 32); u += kSsdWarps) {
                const int row = u % (q / 16) * 16, col = u / (q / 16) * 32, r0 = row + acc_row(), r1 = r0 + 8;
                Accumulator<4> acc;
                acc.zero();  // dXd
                multiply<Layout::plain, Layout::transposed>(acc, Bt + row * ldn, ldn, dS + col * ldn, ldn, N);
                acc.scale_rows(to_end[r0], to_end[r1]);
                multiply<Layout::transposed, Layout::plain>(acc, MG + row * ldq + row, ldq, dy + row * ldp + col, ldp,
                                                            q - row);
                row_dots(X_dXd + col / 32 * q, acc, X, ldp, row, col);
                acc.scale_rows(step[r0], step[r1]);
                write(dsx + x0, n.ld, acc, row, col, valid, real_P);
            }
            const float part = warp_sum(from_in[q - 1] * from_in_dot + new_dot);
            if (lane_id() == 0) S_dot_dS[warp] = part;
            __syncthreads();  // dS, S and dy have been read, the dot products are complete
            if (warp == 0) {
                float later = 0;  // <S_out, dS>, then also the dcs of the tokens after this lane's
                for (int w = 0; w < kSsdWarps; ++w) later += S_dot_dS[w];
                for (int first = q - 32; first >= 0; first -= 32) {
                    const int t = first + lane_id();
                    float sum = 0, xdx = 0;
                    for (int i = 0; i < N / 32; ++i) sum += C_dC[i * q + t] - B_dB[i * q + t];
                    for (int i = 0; i < P / 32; ++i) xdx += X_dXd[i * q + t];
                    for (int d = 1; d < 32; d *= 2) {
                        const float right = __shfl_down_sync(~0u, sum, d);
                        if (lane_id() + d < 32) sum += right;
                    }
                    sum += later;
                    later = __shfl_sync(~0u, sum, 0);
                    if (t < valid) {
                        ddt[(row0 + t) * n.H + h] = xdx;
                        ddA[(row0 + t) * n.H + h] = sum;
                    }
                }
            }
        }
        const float all = from_in[q - 1];
        log_decay += cs[q - 1];
        for (int i = 2 * int(threadIdx.x); i < q * P; i += 2 * kSsdThreads) {  // from_in dY, in place
            const int t = i / P, p = i % P;
            float f[2];
            load<2>(f, dy + t * ldp + p);
            store2(dy + t * ldp + p, from_in[t] * f[0], from_in[t] * f[1]);
        }
        __syncthreads();  // from_in dY is complete
#pragma unroll
        for (int i = 0; i < SU; ++i)
            if (mine(i)) {
                state[i].scale_rows(all, all);
                multiply<Layout::transposed, Layout::plain>(state[i], dy + unit_row(i), ldp, C + unit_col(i), ldn, q);
                for_pairs(i, [&](bool, int, int tile_at, float& s0, float& s1) { store2(dS + tile_at, s0, s1); });
            }
        __syncthreads();  // all tiles and vectors have been read
    }
    if (kStateOnly && threadIdx.x == 0) log_decays[blockIdx.x] = log_decay;
    if (kStateOnly || (dS_0 && segment == 0))
#pragma unroll
        for (int i = 0; i < SU; ++i)
            if (mine(i))
                for_pairs(i, [&](bool inside, int at, int, float& s0, float& s1) {
                    if (inside) store2(dS_0 + (kStateOnly ? int64(blockIdx.x) : bh) * PN + at, s0, s1);
                });
}

// Where there are few (sequence, head) pairs, one block for each would leave most of the GPU idle. Then the chunks of
// a pair are cut into segments, in three launches: each segment's state from a zero start (kStateOnly); the states at
// the segments' borders, from those; and the full sweep, one block per segment, which now knows where it starts. The
// backward likewise, from the end. The number of segments follows from the shape alone.
static constexpr int64 kSsdBlocks = 264;  // two for each multiprocessor of an H100
static int64 ssd_segments(const SsdShape& n, const SsdTiles& t) {
    const int64 wanted = n.B * n.H * 2 > kSsdBlocks ? 1 : kSsdBlocks / (n.B * n.H);
    const int64 chunks = ssd_chunks(t, n.T),
                per_segment = ceil_div(chunks, std::min(wanted, std::max<int64>(1, chunks / 4)));
    return ceil_div(chunks, per_segment);  // none is empty
}
// Floats of scratch that the segments' states and decays take.
static int64 ssd_scratch(const SsdShape& n, const SsdTiles& t) {
    const int64 segments = ssd_segments(n, t);
    return segments == 1 ? 0 : n.B * n.H * segments * (n.P * n.N + 1);
}
// states (B,H,segments,P,N): in, what each segment adds; out, the state at its start (its end, if reverse).
__global__ void pass_states_kernel(float* states, const float* log_decays, const float* S_0, int64 n, int64 PN,
                                   int64 segments, bool reverse) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64 bh = i / PN;
    float s = S_0 ? S_0[i] : 0.0f;
    for (int64 step = 0; step < segments; ++step) {
        const int64 at = bh * segments + (reverse ? segments - 1 - step : step);
        const float added = states[at * PN + i % PN];
        states[at * PN + i % PN] = s;
        s = expf(log_decays[at]) * s + added;
    }
}

// S_T, chunk_states and S_0 may be null: not wanted, or zero. S_0 and S_T may be the same memory.
template <class A>
static void ssd_forward(A* Y, float* S_T, float* chunk_states, float* scratch, const A* sc, const A* sb, const A* sx,
                        const float* dt, const float* dA, const float* S_0, const SsdShape& n, const SsdTiles& t,
                        cudaStream_t stream) {
    const int64 segments = ssd_segments(n, t), blocks = n.B * n.H * segments, PN = n.P * n.N;
    const size_t shared = ssd_shared<A>(t, false);
    const bool small = t.units() <= 2 * kSsdWarps;
    if (segments > 1) {
        float* log_decays = scratch + blocks * PN;
        launch("ssd_forward", small ? ssd_forward_kernel<A, 2, 0, 0, true> : ssd_forward_kernel<A, 8, 0, 0, true>,
               blocks, kSsdThreads, shared, stream, nullptr, scratch, nullptr, sc, sb, sx, dt, dA, nullptr, log_decays,
               n, t, segments);
        launch("ssd_forward", pass_states_kernel, ceil_div(n.B * n.H * PN, 256), 256, 0, stream, scratch, log_decays,
               S_0, n.B * n.H * PN, PN, segments, false);
        S_0 = scratch;
    }
    const auto kernel = t.q == 64 && n.N == 128 && n.P == 64  ? ssd_forward_kernel<A, 2, 128, 64, false>
                        : t.q == 64 && n.N == 64 && n.P == 64 ? ssd_forward_kernel<A, 1, 64, 64, false>
                        : small                               ? ssd_forward_kernel<A, 2, 0, 0, false>
                                                              : ssd_forward_kernel<A, 8, 0, 0, false>;
    launch("ssd_forward", kernel, blocks, kSsdThreads, shared, stream, Y, S_T, chunk_states, sc, sb, sx, dt, dA, S_0,
           nullptr, n, t, segments);
}
template <class A>
static void ssd_backward(A* dsc, A* dsb, A* dsx, float* ddt, float* ddA, float* dS_0, float* scratch, const A* dY,
                         const float* dS_T, const A* sc, const A* sb, const A* sx, const float* dt, const float* dA,
                         const float* chunk_states, const SsdShape& n, const SsdTiles& t, cudaStream_t stream) {
    const int64 segments = ssd_segments(n, t), blocks = n.B * n.H * segments, PN = n.P * n.N;
    const size_t shared = ssd_shared<A>(t, true);
    const bool small = t.units() <= 2 * kSsdWarps;
    if (segments > 1) {
        float* log_decays = scratch + blocks * PN;
        launch("ssd_backward", small ? ssd_backward_kernel<A, 2, 0, 0, true> : ssd_backward_kernel<A, 8, 0, 0, true>,
               blocks, kSsdThreads, shared, stream, nullptr, nullptr, nullptr, nullptr, nullptr, scratch, dY, nullptr,
               sc, sb, sx, dt, dA, nullptr, log_decays, n, t, segments);
        launch("ssd_backward", pass_states_kernel, ceil_div(n.B * n.H * PN, 256), 256, 0, stream, scratch, log_decays,
               dS_T, n.B * n.H * PN, PN, segments, true);
        dS_T = scratch;
    }
    const auto kernel = t.q == 64 && n.N == 128 && n.P == 64  ? ssd_backward_kernel<A, 2, 128, 64, false>
                        : t.q == 64 && n.N == 64 && n.P == 64 ? ssd_backward_kernel<A, 1, 64, 64, false>
                        : small                               ? ssd_backward_kernel<A, 2, 0, 0, false>
                                                              : ssd_backward_kernel<A, 8, 0, 0, false>;
    launch("ssd_backward", kernel, blocks, kSsdThreads, shared, stream, dsc, dsb, dsx, ddt, ddA, dS_0, dY, dS_T, sc, sb,
           sx, dt, dA, chunk_states, nullptr, n, t, segments);
}

// ---------------------------------------------------------------------------------------------------------------------
// 8  Residual: out = w * x + dropout(m), and the norm that follows: u = rmsnorm(out) * w_norm
// ---------------------------------------------------------------------------------------------------------------------
// Every half of a layer is  x -> u = rmsnorm(x) * w_norm -> m = f(u) -> out = w * x + dropout(m),  and out is the
// next half's x. These kernels join a residual with the norm after it (forward) and a norm with the residual around
// it (backward): each tensor then crosses the memory bus once. They are bound by it.
//
// A block takes a few rows at a time; a thread owns W neighbouring columns of all of them, so that weights are read
// once per group. Sums over a row: within warps by shuffles, across warps through shared memory. Two buffers take
// turns, so that one barrier per group is enough: a thread is at most one group ahead.

static constexpr int kRowGroup = 4, kBackwardRows = 2;  // the backward has more to keep in registers

template <int R>
__device__ inline void block_row_sums(float (&s)[R], float (*buffer)[8]) {  // buffer[R][8]; up to 8 warps
    const int warp = int(threadIdx.x) / 32, warps = int(blockDim.x) / 32;
#pragma unroll
    for (int r = 0; r < R; ++r) {
        s[r] = warp_sum(s[r]);
        if (lane_id() == 0) buffer[r][warp] = s[r];
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < R; ++r) {
        s[r] = 0;
        for (int w = 0; w < warps; ++w) s[r] += buffer[r][w];
    }
}

// The random words of Philox4x32-10 (common.h), for dropout.
struct PhiloxKey {
    uint32_t k0, k1;
};
__device__ inline void philox(uint32_t (&c)[4], PhiloxKey key) {
    for (int round = 0; round < 10; ++round) {
        const uint32_t h0 = __umulhi(0xD2511F53u, c[0]), l0 = 0xD2511F53u * c[0];
        const uint32_t h1 = __umulhi(0xCD9E8D57u, c[2]), l1 = 0xCD9E8D57u * c[2];
        c[0] = h1 ^ c[1] ^ key.k0;
        c[2] = h0 ^ c[3] ^ key.k1;
        c[1] = l1;
        c[3] = l0;
        key.k0 += 0x9E3779B9u;
        key.k1 += 0xBB67AE85u;
    }
}
// Dropout, ready for a kernel: element e is dropped if its word is below `threshold`. threshold 0: none.
struct DropoutMask {
    PhiloxKey key;
    uint32_t step, micro_batch, site, threshold;
    float keep;  // 1 / (1 - p)
};
static DropoutMask dropout_mask(const Dropout& d) {
    const Philox stream(d.key.seed, "dropout");
    return {{stream.key[0], stream.key[1]}, d.key.step, d.key.micro_batch, d.site, uint32_t(d.p * 4294967296.0),
            float(1.0 / (1.0 - d.p))};
}
// mask/(1-p) of elements e .. e+W-1; W is 1, or e and W are multiples of 4.
template <int W>
__device__ inline void dropout_factors(float (&f)[W], const DropoutMask& d, int64 e) {
#pragma unroll
    for (int i = 0; i < W; i += 4) {
        const uint64_t block = uint64_t(e + i) / 4;
        uint32_t c[4] = {uint32_t(block), d.step, d.micro_batch, d.site << 8 | uint32_t(block >> 32)};
        philox(c, d.key);
        if (W == 1) {
            const int word = int(e % 4);
            f[0] = (word == 0 ? c[0] : word == 1 ? c[1] : word == 2 ? c[2] : c[3]) < d.threshold ? 0.0f : d.keep;
        } else {
#pragma unroll
            for (int j = 0; j < 4 && i + j < W; ++j) f[i + j] = c[j] < d.threshold ? 0.0f : d.keep;
        }
    }
}

// m null: no residual, x is normalised and out is not written. u null: only the residual.
template <class A, int W>
__global__ void residual_norm_forward_kernel(A* out, A* u, float* rstd, const A* x, const A* m, const float* w_res,
                                             const float* w_norm, float eps, DropoutMask mask, int64 rows, int64 D) {
    __shared__ float buffers[2][kRowGroup][8];
    int turn = 0;
    // The value to be normalised, as it is stored: the sum, rounded to A.
    const auto value = [&](float(&v)[W], int64 at, const float(&w)[W]) {
        load<W>(v, x + at);
        if (!m) return;
        float mv[W];
        load<W>(mv, m + at);
        if (mask.threshold) {
            float f[W];
            dropout_factors<W>(f, mask, at);
#pragma unroll
            for (int i = 0; i < W; ++i) mv[i] *= f[i];
        }
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = to_float(from_float<A>(w[i] * v[i] + mv[i]));
    };
    for (int64 r0 = int64(blockIdx.x) * kRowGroup; r0 < rows; r0 += int64(gridDim.x) * kRowGroup, turn ^= 1) {
        float sum[kRowGroup] = {};
        for (int64 c = int64(threadIdx.x) * W; c < D; c += int64(blockDim.x) * W) {
            float w[W] = {};
            if (m)
#pragma unroll
                for (int i = 0; i < W; ++i) w[i] = w_res[c + i];
#pragma unroll
            for (int r = 0; r < kRowGroup; ++r) {
                if (r0 + r >= rows) continue;
                float v[W];
                value(v, (r0 + r) * D + c, w);
                if (m) store<W>(out + (r0 + r) * D + c, v);
#pragma unroll
                for (int i = 0; i < W; ++i) sum[r] += v[i] * v[i];
            }
        }
        if (!u) continue;
        block_row_sums(sum, buffers[turn]);
#pragma unroll
        for (int r = 0; r < kRowGroup; ++r) {
            sum[r] = 1.0f / sqrtf(sum[r] / float(D) + eps);
            if (int(threadIdx.x) == r && r0 + r < rows) rstd[r0 + r] = sum[r];
        }
        for (int64 c = int64(threadIdx.x) * W; c < D; c += int64(blockDim.x) * W) {
            float w[W] = {}, wn[W];
#pragma unroll
            for (int i = 0; i < W; ++i) {
                if (m) w[i] = w_res[c + i];
                wn[i] = w_norm[c + i];
            }
#pragma unroll
            for (int r = 0; r < kRowGroup; ++r) {
                if (r0 + r >= rows) continue;
                float v[W];
                value(v, (r0 + r) * D + c, w);  // the same numbers again, from the cache
#pragma unroll
                for (int i = 0; i < W; ++i) v[i] = v[i] * sum[r] * wn[i];
                store<W>(u + (r0 + r) * D + c, v);
            }
        }
    }
}
static int row_threads(int64 D, int W) { return int(std::min<int64>(256, round_up(ceil_div(D, W), 32))); }

template <class A>
static void residual_norm_forward(A* out, A* u, float* rstd, const A* x, const A* m, const float* w_res,
                                  const float* w_norm, double eps, const Dropout& dropout, int64 rows, int64 D,
                                  cudaStream_t stream) {
    const int W = D % 8 == 0 ? 8 : 1;
    launch(m ? "residual_norm_forward" : "rmsnorm_forward",
           W == 8 ? residual_norm_forward_kernel<A, 8> : residual_norm_forward_kernel<A, 1>,
           std::min<int64>(ceil_div(rows, kRowGroup), 1 << 20), row_threads(D, W), 0, stream, out, u, rstd, x, m, w_res,
           w_norm, float(eps), dropout_mask(dropout), rows, D);
}

// dx = w_res dout + rstd (du w_norm - x rstd^2 sum(du w_norm x) / D)          dout null: no residual, its term is
// absent dw_norm += sum_rows du x rstd,   dw_res += sum_rows dout x dx and dout may be the same memory. partial
// (blocks, 2D): sums for dw_norm | dw_res, gathered in shared memory, where a thread's W columns lie D/W apart so
// that neighbouring threads use different banks. kKeep: D is at most one pass of the block, and what the first sum
// has read stays in registers for the second.
template <class A, int W, bool kKeep>
__global__ void norm_residual_backward_kernel(A* dx, float* partial, const A* dout, const A* du, const A* x,
                                              const float* w_res, const float* w_norm, const float* rstd, int64 rows,
                                              int64 D, int64 block_rows) {
    __shared__ float buffers[2][kBackwardRows][8];
    extern __shared__ float sums[];  // (2, W, D/W)
    const int64 stride = D / W, first = blockIdx.x * block_rows, last = min(rows, first + block_rows);
    for (int64 c = threadIdx.x; c < stride; c += blockDim.x)
        for (int i = 0; i < 2 * W; ++i) sums[i * stride + c] = 0;
    int turn = 0;
    for (int64 r0 = first; r0 < last; r0 += kBackwardRows, turn ^= 1) {
        float dot[kBackwardRows] = {};
        Pack<A, W> kept_x[kBackwardRows], kept_du[kBackwardRows], kept_dout[kBackwardRows];
        const auto fetch = [&](int r, int64 at) {
            kept_x[r] = *reinterpret_cast<const Pack<A, W>*>(x + at);
            kept_du[r] = *reinterpret_cast<const Pack<A, W>*>(du + at);
            if (dout) kept_dout[r] = *reinterpret_cast<const Pack<A, W>*>(dout + at);
        };
        for (int64 c = int64(threadIdx.x) * W; c < D; c += int64(blockDim.x) * W) {
            float wn[W];
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r)
                if (r0 + r < last) fetch(r, (r0 + r) * D + c);
#pragma unroll
            for (int i = 0; i < W; ++i) wn[i] = w_norm[c + i];
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r)
                if (r0 + r < last)
#pragma unroll
                    for (int i = 0; i < W; ++i) dot[r] += to_float(kept_du[r].v[i]) * wn[i] * to_float(kept_x[r].v[i]);
        }
        block_row_sums(dot, buffers[turn]);
        for (int64 c = int64(threadIdx.x) * W; c < D; c += int64(blockDim.x) * W) {
            float wn[W], wr[W] = {}, sum_norm[W] = {}, sum_res[W] = {};
#pragma unroll
            for (int i = 0; i < W; ++i) {
                wn[i] = w_norm[c + i];
                if (dout) wr[i] = w_res[c + i];
            }
#pragma unroll
            for (int r = 0; r < kBackwardRows; ++r) {
                if (r0 + r >= last) continue;
                const int64 at = (r0 + r) * D + c;
                const float s = rstd[r0 + r], k = s * s * dot[r] / float(D);
                if (!kKeep) fetch(r, at);
                float dxv[W];
#pragma unroll
                for (int i = 0; i < W; ++i) {
                    const float xi = to_float(kept_x[r].v[i]), dui = to_float(kept_du[r].v[i]);
                    const float doi = dout ? to_float(kept_dout[r].v[i]) : 0.0f;
                    dxv[i] = wr[i] * doi + s * (dui * wn[i] - xi * k);
                    sum_norm[i] += dui * xi * s;
                    sum_res[i] += doi * xi;
                }
                store<W>(dx + at, dxv);
            }
#pragma unroll
            for (int i = 0; i < W; ++i) {
                sums[i * stride + c / W] += sum_norm[i];
                sums[(W + i) * stride + c / W] += sum_res[i];
            }
        }
    }
    for (int64 c = threadIdx.x; c < stride; c += blockDim.x)
        for (int i = 0; i < W; ++i) {
            partial[blockIdx.x * 2 * D + c * W + i] = sums[i * stride + c];
            partial[blockIdx.x * 2 * D + D + c * W + i] = sums[(W + i) * stride + c];
        }
}
// dw_res null with dout null.
template <class A>
static void norm_residual_backward(A* dx, float* dw_norm, float* dw_res, float* partial, const A* dout, const A* du,
                                   const A* x, const float* w_res, const float* w_norm, const float* rstd, int64 rows,
                                   int64 D, cudaStream_t stream) {
    const int W =
        D % 4 == 0 ? 4 : 1;  // not 8: it would need so many registers that too few warps are there to wait for memory
    const int64 block_rows = round_up(ceil_div(rows, kPartialBlocks), kBackwardRows),
                blocks = ceil_div(rows, block_rows);
    launch("norm_residual_backward",
           W == 1                       ? norm_residual_backward_kernel<A, 1, false>
           : D <= row_threads(D, W) * W ? norm_residual_backward_kernel<A, 4, true>
                                        : norm_residual_backward_kernel<A, 4, false>,
           blocks, row_threads(D, W), size_t(2 * D) * sizeof(float), stream, dx, partial, dout, du, x, w_res, w_norm,
           rstd, rows, D, block_rows);
    add_partials(dw_norm, dw_res, partial, blocks, 2 * D, D, stream);
}

// dm = mask/(1-p) dout
template <class A, int W>
__global__ void dropout_backward_kernel(A* dm, const A* dout, DropoutMask mask, int64 n) {
    const int64 e = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (e >= n) return;
    float v[W], f[W];
    load<W>(v, dout + e);
    dropout_factors<W>(f, mask, e);
#pragma unroll
    for (int i = 0; i < W; ++i) v[i] *= f[i];
    store<W>(dm + e, v);
}
template <class A>
static void dropout_backward(A* dm, const A* dout, const Dropout& dropout, int64 n, cudaStream_t stream) {
    const int W = n % 8 == 0 ? 8 : 1;
    launch("dropout_backward", W == 8 ? dropout_backward_kernel<A, 8> : dropout_backward_kernel<A, 1>,
           ceil_div(n, 256 * W), 256, 0, stream, dm, dout, dropout_mask(dropout), n);
}

// ---------------------------------------------------------------------------------------------------------------------
// 9  SwiGLU: h = silu(g) * u,  silu(g) = g sigmoid(g)                           gate_up (rows,2F): g | u   ->  h (rows,F)
// ---------------------------------------------------------------------------------------------------------------------
// One thread makes W elements; bound by memory.

template <class A, int W>
__global__ void swiglu_forward_kernel(A* h, const A* gate_up, int64 n, int64 F) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    const int64 r = i / F, f = i % F;
    float g[W], u[W];
    load<W>(g, gate_up + r * 2 * F + f);
    load<W>(u, gate_up + r * 2 * F + F + f);
#pragma unroll
    for (int k = 0; k < W; ++k) u[k] *= g[k] / (1.0f + exp_for<A>(-g[k]));
    store<W>(h + i, u);
}
template <class A>
static void swiglu_forward(A* h, const A* gate_up, int64 rows, int64 F, cudaStream_t stream) {
    const int W = F % 8 == 0 ? 8 : 1;
    launch("swiglu_forward", W == 8 ? swiglu_forward_kernel<A, 8> : swiglu_forward_kernel<A, 1>,
           ceil_div(rows * F, 256 * W), 256, 0, stream, h, gate_up, rows * F, F);
}

// du = dh silu(g);  dg = dh u silu'(g),  silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
template <class A, int W>
__global__ void swiglu_backward_kernel(A* dgate_up, const A* dh, const A* gate_up, int64 n, int64 F) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    const int64 r = i / F, f = i % F, at = r * 2 * F + f;
    float g[W], u[W], d[W];
    load<W>(g, gate_up + at);
    load<W>(u, gate_up + at + F);
    load<W>(d, dh + i);
#pragma unroll
    for (int k = 0; k < W; ++k) {
        const float s = 1.0f / (1.0f + exp_for<A>(-g[k]));
        const float dg = d[k] * u[k] * s * (1.0f + g[k] * (1.0f - s));
        u[k] = d[k] * g[k] * s;
        g[k] = dg;
    }
    store<W>(dgate_up + at, g);
    store<W>(dgate_up + at + F, u);
}
template <class A>
static void swiglu_backward(A* dgate_up, const A* dh, const A* gate_up, int64 rows, int64 F, cudaStream_t stream) {
    const int W = F % 8 == 0 ? 8 : 1;
    launch("swiglu_backward", W == 8 ? swiglu_backward_kernel<A, 8> : swiglu_backward_kernel<A, 1>,
           ceil_div(rows * F, 256 * W), 256, 0, stream, dgate_up, dh, gate_up, rows * F, F);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10  Cross-entropy: loss_r = log sum_v exp(z_rv) - z_r,target;   dz = softmax(z) - onehot(target)
// ---------------------------------------------------------------------------------------------------------------------
// One block per row. The first pass reads the row once and keeps (largest, sum of exp(z - largest)); the second
// replaces z by dz (unscaled: the matrix products that read it scale) while the row is still in the cache. Rows are
// ld >= V apart; columns beyond V become zero.

template <class A, int W>
__global__ void __launch_bounds__(512)
    cross_entropy_kernel(float* losses, A* logits, const int32_t* targets, int64 V, int64 ld, bool gradient) {
    __shared__ float tops[16], sums[16];
    A* z = logits + int64(blockIdx.x) * ld;
    const int target = targets[blockIdx.x];
    float top = -INFINITY, sum = 0;
    for (int64 v = int64(threadIdx.x) * W; v < V; v += int64(blockDim.x) * W) {
        float f[W];
        load<W>(f, z + v);
        float largest = top;
#pragma unroll
        for (int i = 0; i < W; ++i) largest = fmaxf(largest, f[i]);
        sum *= expf(top - largest);
        top = largest;
#pragma unroll
        for (int i = 0; i < W; ++i) sum += exp_for<A>(f[i] - top);
    }
    // Joins (top, sum) of two parts; a thread or warp that saw nothing has sum 0 and must not make inf - inf.
    const auto join = [&](float other_top, float other_sum) {
        const float largest = fmaxf(top, other_top);
        if (largest == -INFINITY) return;
        sum = sum * expf(top - largest) + other_sum * expf(other_top - largest);
        top = largest;
    };
#pragma unroll
    for (int d = 16; d > 0; d /= 2) join(__shfl_xor_sync(~0u, top, d), __shfl_xor_sync(~0u, sum, d));
    if (lane_id() == 0) {
        tops[threadIdx.x / 32] = top;
        sums[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    top = tops[0];
    sum = sums[0];
    for (int w = 1; w < int(blockDim.x) / 32; ++w) join(tops[w], sums[w]);
    const float lse = top + logf(sum);
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + (top - to_float(z[target]));
    if (!gradient) return;
    __syncthreads();  // z[target] has been read
    for (int64 v = int64(threadIdx.x) * W; v < ld; v += int64(blockDim.x) * W) {
        float f[W] = {};
        if (v < V) {
            load<W>(f, z + v);
#pragma unroll
            for (int i = 0; i < W; ++i) f[i] = exp_for<A>(f[i] - lse) - (v + i == target ? 1.0f : 0.0f);
        }
        store<W>(z + v, f);
    }
}
template <class A>
static void cross_entropy(float* losses, A* logits, const int32_t* targets, int64 rows, int64 V, bool gradient,
                          cudaStream_t stream) {
    const bool vectors = V % 8 == 0;
    launch("cross_entropy", vectors ? cross_entropy_kernel<A, 8> : cross_entropy_kernel<A, 1>, rows, 512, 0, stream,
           losses, logits, targets, V, padded8(V), gradient);
}

// ---------------------------------------------------------------------------------------------------------------------
// 11  AdamW: m, v running means of g and g^2, corrected for their start at 0
// ---------------------------------------------------------------------------------------------------------------------
//     w -= lr ( (m / (1 - beta1^step)) / (sqrt(v / (1 - beta2^step)) + eps)  +  weight_decay w )
// One launch for all parameters: block i does tile i of a list made at the start. It also writes the rounded copy
// that the matrix products read (bf16). 30 bytes per parameter: bound by memory.

struct AdamWTile {
    int64 offset;  // first element in the flat buffers
    int64 copy;    // where its rounded copy goes, -1: nowhere
    int32_t count;
    int32_t decay;
};
static constexpr int32_t kAdamWTile = 8192;

struct AdamWRates {
    float beta1, beta2, one_beta1, one_beta2, correction1, correction2, lr, eps, weight_decay, scale;
};
template <class A>
__global__ void adamw_kernel(float* w, A* copy, float* m, float* v, const float* g, const AdamWTile* tiles,
                             AdamWRates o) {
    const AdamWTile tile = tiles[blockIdx.x];
    const float decay = tile.decay ? o.weight_decay : 0.0f;
    const auto update = [&](auto width, int i) {
        constexpr int W = decltype(width)::value;
        const int64 e = tile.offset + i;
        float wi[W], mi[W], vi[W], gi[W];
        load<W>(wi, w + e);
        load<W>(mi, m + e);
        load<W>(vi, v + e);
        load<W>(gi, g + e);
#pragma unroll
        for (int j = 0; j < W; ++j) {
            gi[j] *= o.scale;
            mi[j] = o.beta1 * mi[j] + o.one_beta1 * gi[j];
            vi[j] = o.beta2 * vi[j] + o.one_beta2 * gi[j] * gi[j];
            wi[j] -= o.lr * (mi[j] * o.correction1 / (sqrtf(vi[j] * o.correction2) + o.eps) + decay * wi[j]);
        }
        store<W>(w + e, wi);
        store<W>(m + e, mi);
        store<W>(v + e, vi);
        if (tile.copy >= 0) store<W>(copy + tile.copy + i, wi);
    };
    if (tile.offset % 4 == 0 && tile.count % 4 == 0 && (tile.copy < 0 || tile.copy % 4 == 0))
        for (int i = 4 * int(threadIdx.x); i < tile.count; i += 4 * int(blockDim.x))
            update(std::integral_constant<int, 4>(), i);
    else
        for (int i = int(threadIdx.x); i < tile.count; i += int(blockDim.x))
            update(std::integral_constant<int, 1>(), i);
}
// The copy alone, after weights were written from the host.
template <class A>
__global__ void copy_weights_kernel(A* copy, const float* w, const AdamWTile* tiles) {
    const AdamWTile tile = tiles[blockIdx.x];
    if (tile.copy < 0) return;
    for (int i = int(threadIdx.x); i < tile.count; i += int(blockDim.x))
        copy[tile.copy + i] = from_float<A>(w[tile.offset + i]);
}
static AdamWRates adamw_rates(const AdamW& o, double lr, int64 step, double grad_scale) {
    return {float(o.beta1),
            float(o.beta2),
            float(1 - o.beta1),
            float(1 - o.beta2),
            float(1 / (1 - std::pow(o.beta1, double(step)))),
            float(1 / (1 - std::pow(o.beta2, double(step)))),
            float(lr),
            float(o.eps),
            float(o.weight_decay),
            float(grad_scale)};
}

// Sum of squares, in double: one partial sum per block of fixed size.
__global__ void sum_of_squares_kernel(double* partial, const float* g, int64 n, int64 block_size) {
    __shared__ double sums[256];
    const int64 first = blockIdx.x * block_size, last = min(n, first + block_size);
    double s = 0;
    for (int64 i = first + threadIdx.x; i < last; i += blockDim.x) s += double(g[i]) * double(g[i]);
    sums[threadIdx.x] = s;
    for (int d = 128; d > 0; d /= 2) {
        __syncthreads();
        if (int(threadIdx.x) < d) sums[threadIdx.x] += sums[threadIdx.x + d];
    }
    if (threadIdx.x == 0) partial[blockIdx.x] = sums[0];
}

// The lowest index of a number that is not finite. An atomic minimum of integers has one result in any order.
template <class T>
__global__ void first_bad_kernel(unsigned long long* first, const T* v, int64 rows, int64 width, int64 ld) {
    for (int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * width; i += int64(gridDim.x) * blockDim.x)
        if (!isfinite(to_float(v[i / width * ld + i % width]))) atomicMin(first, (unsigned long long)i);
}

// Rows r_0, r_1, ... of D numbers: the last token of each sequence.
template <class A>
__global__ void gather_last_kernel(A* last, const A* u, int64 n, int64 T, int64 D) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) last[i] = u[((i / D + 1) * T - 1) * D + i % D];
}
// k or v of new tokens into the cache: from rows `ld` apart to (sequence, position, width).
template <class A>
__global__ void append_cache_kernel(A* cache, const A* from, int64 n, int64 T, int64 width, int64 ld, int64 capacity,
                                    Position position) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64 r = i / width, c = i % width;
    cache[(r / T * capacity + position.get() + r % T) * width + c] = from[r * ld + c];
}
template <class To, class From>
__global__ void convert_kernel(To* to, const From* from, int64 n) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < n) to[i] = from_float<To>(to_float(from[i]));
}

// ---------------------------------------------------------------------------------------------------------------------
// 11b  Decoding: one further token of each sequence
// ---------------------------------------------------------------------------------------------------------------------
// A step reads every weight once, reads and writes every SSD state, and reads the cache: it is bound by these bytes. The
// kernels here read them once, with RoPE, dt and the decay applied on the way.

// What a run of decode steps advances, in device memory: a step is recorded once and replayed.
struct DecodeCursor {
    int64 position;  // tokens consumed so far
    int64 made;      // tokens chosen in this run
};

// ---- SSD: S = a S + dt X (x) B,  y = S C;  a = exp(dA),  C and B turned by RoPE ---------------------------------------
// One warp per kStepRows rows of the state of one (sequence, head), S (B,H,P,N) in place. A lane owns W neighbouring
// pairs (j, j + N/2), which RoPE turns into each other. All rows are loaded before the first is written.

static constexpr int kStepRows = 8;

template <class A, int W>
__global__ void __launch_bounds__(128)
    ssd_step_kernel(A* y, float* S, const A* proj, const float* dt_bias, const float* A_log, const float* cos,
                    const float* sin, bool decay, SsdShape n, Position position) {
    const int64 groups = (n.P + kStepRows - 1) / kStepRows, half = n.N / 2;
    const int64 i = int64(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
    if (i >= n.B * n.H * groups) return;
    const int64 b = i / groups / n.H, h = i / groups % n.H, p0 = i % groups * kStepRows;
    const int rows = int(min(int64(kStepRows), n.P - p0));
    const A *row = proj + b * n.ld, *C = row + h * n.N, *Bt = C + n.H * n.N, *X = row + 2 * n.H * n.N + h * n.P + p0;
    const float dt = softplus(to_float(row[2 * n.H * n.N + n.H * n.P + h]) + dt_bias[h]);
    const float a = decay ? expf(-expf(A_log[h]) * dt) : 1.0f;
    float* s = S + ((b * n.H + h) * n.P + p0) * n.N;
    cos += position.get() * half;
    sin += position.get() * half;
    float x[kStepRows], sum[kStepRows];
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
        x[r] = r < rows ? dt * to_float(X[r]) : 0.0f;
        sum[r] = 0;
    }
    for (int64 j = lane_id() * W; j < half; j += 32 * W) {
        float lo[kStepRows][W], hi[kStepRows][W], c1[W], c2[W], b1[W], b2[W], turn_c[W], turn_s[W];
#pragma unroll
        for (int r = 0; r < kStepRows; ++r)
            if (r < rows) {
                load<W>(lo[r], s + r * n.N + j);
                load<W>(hi[r], s + r * n.N + half + j);
            }
        load<W>(c1, C + j);
        load<W>(c2, C + half + j);
        load<W>(b1, Bt + j);
        load<W>(b2, Bt + half + j);
        load<W>(turn_c, cos + j);
        load<W>(turn_s, sin + j);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            const float c = c1[k] * turn_c[k] - c2[k] * turn_s[k], bt = b1[k] * turn_c[k] - b2[k] * turn_s[k];
            c2[k] = c2[k] * turn_c[k] + c1[k] * turn_s[k];
            b2[k] = b2[k] * turn_c[k] + b1[k] * turn_s[k];
            c1[k] = c;
            b1[k] = bt;
        }
#pragma unroll
        for (int r = 0; r < kStepRows; ++r)
            if (r < rows) {
#pragma unroll
                for (int k = 0; k < W; ++k) {
                    lo[r][k] = a * lo[r][k] + x[r] * b1[k];
                    hi[r][k] = a * hi[r][k] + x[r] * b2[k];
                    sum[r] += lo[r][k] * c1[k] + hi[r][k] * c2[k];
                }
                store<W>(s + r * n.N + j, lo[r]);
                store<W>(s + r * n.N + half + j, hi[r]);
            }
    }
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
        const float total = warp_sum(sum[r]);
        if (lane_id() == r && r < rows) y[(b * n.H + h) * n.P + p0 + r] = from_float<A>(total);
    }
}
// proj: rows C | B | X | dt_raw, n.ld apart; n.T is 1.
template <class A>
static void ssd_step(A* y, float* S, const A* proj, const float* dt_bias, const float* A_log, const float* cos,
                     const float* sin, bool decay, const SsdShape& n, Position position, cudaStream_t stream) {
    const bool pairs = n.N % 4 == 0 && n.ld % 2 == 0;
    launch("ssd_step", pairs ? ssd_step_kernel<A, 2> : ssd_step_kernel<A, 1>,
           ceil_div(n.B * n.H * ceil_div(n.P, kStepRows), 4), 128, 0, stream, y, S, proj, dt_bias, A_log, cos, sin,
           decay, n, position);
}

// ---- Attention: one query of each head over the cache -------------------------------------------------------------------
// The keys of one (sequence, head) are dealt out to `splits` blocks; each leaves the largest of its scores, the sum of
// their exponentials relative to it and the sum of the values so weighted, and a second kernel joins the splits in
// their order. kLanes lanes share a key, 8 of its P numbers each; every such group of lanes has an online softmax of
// its own (powers of 2) and takes kKeys keys at a time. The new key and value are appended on the way; they are taken
// from the projection, since another block may be writing them.

static constexpr int kDecodeThreads = 128, kKeys = 4;
// Splits by the state's shape alone, not by how much of it is filled: enough blocks to fill a GPU, and at least 128 keys
// each when it is full.
static int64 attention_splits(int64 heads, int64 capacity) {
    return std::max<int64>(1, std::min<int64>({ceil_div(2048, heads), ceil_div(capacity, 128), 64}));
}

// Numbers e .. e + 7 of a row of P, zeros beyond its end. Aligned: P is a multiple of 8.
template <bool aligned, class A>
__device__ inline void load_row8(float (&f)[8], const A* row, int e, int P) {
    if (aligned) {
        if (e < P) return load<8>(f, row + e);
#pragma unroll
        for (int i = 0; i < 8; ++i) f[i] = 0;
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) f[i] = e + i < P ? to_float(row[e + i]) : 0.0f;
    }
}
// The same of a row turned by RoPE; the angles' cos and sin have P/2 numbers.
template <class A>
__device__ inline void load_turned8(float (&f)[8], const A* row, int e, int P, const float* cos, const float* sin) {
    const int half = P / 2;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        const int k = e + i, j = k < half ? k : k - half;
        f[i] = 0;
        if (k < P)
            f[i] = k < half ? to_float(row[k]) * cos[j] - to_float(row[k + half]) * sin[j]
                            : to_float(row[k]) * cos[j] + to_float(row[j]) * sin[j];
    }
}

// What a group of lanes knows of the keys it has seen: out / sum is their softmax-weighted mean of values.
struct OnlineSoftmax {
    float top = -1e30f, sum = 0, out[8] = {};
    template <int K>
    __device__ void add(const float (&score)[K], const float (&v)[K][8]) {
        float new_top = top;
#pragma unroll
        for (int u = 0; u < K; ++u) new_top = fmaxf(new_top, score[u]);
        const float shrink = exp2_fast(top - new_top);
        top = new_top;
        sum *= shrink;
#pragma unroll
        for (int i = 0; i < 8; ++i) out[i] *= shrink;
#pragma unroll
        for (int u = 0; u < K; ++u) {
            const float p = exp2_fast(score[u] - top);
            sum += p;
#pragma unroll
            for (int i = 0; i < 8; ++i) out[i] += p * v[u][i];
        }
    }
};

// log2_scale * q . k, on all lanes of the group.
template <int kLanes>
__device__ inline float score_of(const float (&q)[8], const float (&key)[8]) {
    float s = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) s += q[i] * key[i];
#pragma unroll
    for (int d = kLanes / 2; d > 0; d /= 2) s += __shfl_xor_sync(~0u, s, d);
    return s;
}
// Keys first .. last-1 of the cache, dealt out to the groups one by one.
template <int kLanes, bool aligned, class A>
__device__ inline void attend(OnlineSoftmax& mean, const float (&q)[8], const A* k, const A* v, int64 ld, int64 first,
                              int64 last, int group, int groups, int e, int P) {
    for (int64 s0 = first; s0 < last; s0 += groups * kKeys) {
        float keys[kKeys][8], values[kKeys][8], scores[kKeys];
#pragma unroll
        for (int u = 0; u < kKeys; ++u) {
            const int64 at = min(s0 + u * groups + group, last - 1);
            load_row8<aligned>(keys[u], k + at * ld, e, P);
            load_row8<aligned>(values[u], v + at * ld, e, P);
        }
#pragma unroll
        for (int u = 0; u < kKeys; ++u) {
            scores[u] = score_of<kLanes>(q, keys[u]);
            if (s0 + u * groups + group >= last) scores[u] = -INFINITY;
        }
        mean.add(scores, values);
    }
}
// Number c of the weighted sum over the groups of a block; groups[g]: their sums, top, sum.
template <int kGroups, int kWidth>
__device__ inline void join_groups(float* out, float* top, float* sum, const float (*groups)[kWidth + 2], int c,
                                   int P) {
    *top = -1e30f;
    *sum = *out = 0;
    for (int g = 0; g < kGroups; ++g) *top = fmaxf(*top, groups[g][kWidth]);
    for (int g = 0; g < kGroups; ++g) {
        const float scale = exp2_fast(groups[g][kWidth] - *top);
        *sum += scale * groups[g][kWidth + 1];
        if (c < P) *out += scale * groups[g][c];
    }
}

// partial (B,H,splits,P+2): the weighted sum of values | top | sum.
template <class A, int kLanes, bool aligned>
__global__ void __launch_bounds__(kDecodeThreads)
    attention_step_kernel(float* partial, A* k_cache, A* v_cache, const A* proj, const float* cos, const float* sin,
                          AttentionShape n, Position position, int64 splits, float log2_scale) {
    constexpr int kGroups = kDecodeThreads / kLanes;
    __shared__ float shared[kGroups][8 * kLanes + 2];
    const int64 split = blockIdx.x % splits, h = blockIdx.x / splits % n.H, b = blockIdx.x / splits / n.H;
    const int64 past = position.get(), per_split = (past + splits - 1) / splits;
    const int64 first = split * per_split, last = min(past, first + per_split), hkv = h / (n.H / n.Hkv);
    const int P = int(n.P), group = int(threadIdx.x) / kLanes, e = int(threadIdx.x) % kLanes * 8;
    const A* row = proj + b * n.ld_q;
    const A *k_new = row + (n.H + hkv) * P, *v_new = k_new + n.Hkv * P;
    A* k = k_cache + b * n.seq_kv + hkv * P;
    A* v = v_cache + b * n.seq_kv + hkv * P;
    cos += past * (P / 2);
    sin += past * (P / 2);
    float q[8];
    load_turned8(q, row + h * P, e, P, cos, sin);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] *= log2_scale;
    OnlineSoftmax mean;
    attend<kLanes, aligned>(mean, q, k, v, n.ld_kv, first, last, group, kGroups, e, P);
    if (split == splits - 1) {
        float key[1][8], value[1][8], scores[1];
        load_turned8(key[0], k_new, e, P, cos, sin);
        load_row8<false>(value[0], v_new, e, P);
        scores[0] = score_of<kLanes>(q, key[0]);
        if (group == 0) {
            // as the cache will hold it
            if (h % (n.H / n.Hkv) == 0)
                for (int i = 0; i < 8 && e + i < P; ++i) {
                    k[past * n.ld_kv + e + i] = from_float<A>(key[0][i]);
                    v[past * n.ld_kv + e + i] = from_float<A>(value[0][i]);
                }
            mean.add(scores, value);
        }
    }
#pragma unroll
    for (int i = 0; i < 8; ++i) shared[group][e + i] = mean.out[i];
    shared[group][8 * kLanes] = mean.top;
    shared[group][8 * kLanes + 1] = mean.sum;
    __syncthreads();  // the groups' sums are there
    float top, sum, out;
    const int c = int(threadIdx.x);
    join_groups<kGroups, 8 * kLanes>(&out, &top, &sum, shared, c, P);
    float* to = partial + int64(blockIdx.x) * (P + 2);
    if (c < P) to[c] = out;
    if (c == 0) {
        to[P] = top;
        to[P + 1] = sum;
    }
}
// y (B,H,P): the splits of each head joined, one thread per number.
template <class A>
__global__ void attention_join_kernel(A* y, const float* partial, int64 n, int64 P, int64 splits) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const float* from = partial + i / P * splits * (P + 2);
    float top = -1e30f, sum = 0, out = 0;
    for (int64 s = 0; s < splits; ++s) top = fmaxf(top, from[s * (P + 2) + P]);
    for (int64 s = 0; s < splits; ++s) {
        const float scale = exp2_fast(from[s * (P + 2) + P] - top);
        sum += scale * from[s * (P + 2) + P + 1];
        out += scale * from[s * (P + 2) + i % P];
    }
    y[i] = from_float<A>(out / sum);
}
// proj: rows q | k | v before RoPE, n.ld_q apart; the caches' rows are n.ld_kv apart. n.T is 1.
template <class A>
static void attention_step(A* y, float* partial, A* k_cache, A* v_cache, const A* proj, const float* cos,
                           const float* sin, const AttentionShape& n, Position position, int64 splits,
                           cudaStream_t stream) {
    const auto go = [&](auto kernel) {
        launch("attention_step", kernel, n.B * n.H * splits, kDecodeThreads, 0, stream, partial, k_cache, v_cache, proj,
               cos, sin, n, position, splits, float(double(kLog2e) / std::sqrt(double(n.P))));
    };
    if (n.P % 8 != 0) go(attention_step_kernel<A, 16, false>);
    else if (n.P > 64) go(attention_step_kernel<A, 16, true>);
    else go(attention_step_kernel<A, 8, true>);
    launch("attention_join", attention_join_kernel<A>, ceil_div(n.B * n.H * n.P, 256), 256, 0, stream, y, partial,
           n.B * n.H * n.P, n.P, splits);
}

// ---- Choosing: the first of the largest logits --------------------------------------------------------------------------
// As Sampler::choose at temperature 0. A logit and its token are one integer, so that the greatest of many is the same in
// any order: the greater logit, then the lower token. What is not finite outranks all, to be reported.

using Ranked = unsigned long long;
__device__ inline Ranked ranked(float z, int64 token) {
    const uint32_t bits = __float_as_uint(z + 0.0f);  // -0 becomes 0
    uint32_t key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
    if (isnan(z) || z == INFINITY) key = ~0u;
    return Ranked(key) << 32 | (~0u - uint32_t(token));
}
__device__ inline Ranked warp_max(Ranked x) {
#pragma unroll
    for (int d = 16; d > 0; d /= 2) x = max(x, __shfl_xor_sync(~0u, x, d));
    return x;
}
// best (B); logits in rows ld apart, a multiple of 8. One block per sequence.
__global__ void __launch_bounds__(1024) best_logit_kernel(Ranked* best, const float* logits, int64 vocab, int64 ld) {
    __shared__ Ranked warps[32];
    Ranked top = 0;
#pragma unroll 4
    for (int64 i = int64(threadIdx.x) * 4; i < vocab; i += 4096) {
        float z[4];
        load<4>(z, logits + blockIdx.x * ld + i);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (i + k < vocab) top = max(top, ranked(z[k], i + k));
    }
    top = warp_max(top);
    if (lane_id() == 0) warps[threadIdx.x / 32] = top;
    __syncthreads();
    if (threadIdx.x >= 32) return;
    top = warp_max(warps[threadIdx.x]);
    if (threadIdx.x == 0) best[blockIdx.x] = top;
}
// Ends a step: the tokens chosen are the next step's input, and are kept as entry cursor->made of `chosen` (steps,B).
// -1 - token: its logit is not a finite number. One block.
__global__ void choose_kernel(int32_t* tokens, int32_t* chosen, DecodeCursor* cursor, Ranked* best, int64 B) {
    const int64 made = cursor->made;
    for (int64 b = threadIdx.x; b < B; b += blockDim.x) {
        const int32_t token = int32_t(~0u - uint32_t(best[b]));
        const uint32_t key = uint32_t(best[b] >> 32);
        const bool bad = key == ~0u || key == 0x007FFFFFu;  // NaN or +inf; the best is -inf
        best[b] = 0;
        tokens[b] = token;
        chosen[made * B + b] = bad ? -1 - token : token;
    }
    __syncthreads();  // all have read the cursor
    if (threadIdx.x > 0) return;
    ++cursor->position;
    ++cursor->made;
}

// ---- A whole token in one kernel ------------------------------------------------------------------------------------------
// With one or two sequences a layer's weights pass in a few microseconds, and the pauses between kernels would take longer
// than that. So one kernel does all layers. It has one block per multiprocessor, all of them running at once (a cooperative
// launch), and every block owns the same share of the rows of every matrix.
//
// WEIGHTS. A block's rows of the four matrices of one layer fit into its shared memory. As soon as a matrix has been used,
// the copy of the next layer's begins in its place: memory never waits for arithmetic. A warp owns 1/8 of the columns of
// these rows, copies them for itself and multiplies them (tensor cores: 16 rows by up to 8 sequences); the 8 parts of a
// sum are added in the order of the warps.
//
// ACTIVATIONS pass from block to block through memory in words of 64 bits: two bf16 numbers (or one float) and a tag that
// is new in each layer of each step. Such a word is written and read as one, so that whoever finds the tag has the
// numbers, and no barrier is needed. Nothing is overwritten too early: the next word in the same place depends, through
// the words in between, on all that was made of this one.
//
// Per layer five exchanges: x -> projection -> y -> x_mid -> h -> x; attention has one more, between splits and y.

using Word = unsigned long long;
__device__ inline void send(Word* to, uint32_t data, uint32_t tag) {
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(Word(tag) << 32 | data) : "memory");
}
__device__ inline Word peek(const Word* from) {
    Word w;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(w) : "l"(from) : "memory");
    return w;
}
// Words from[0], from[step], ...: all are asked for before the first is waited for.
template <int K>
__device__ inline void receive(uint32_t (&data)[K], const Word* const (&from)[K], uint32_t tag) {
    Word w[K];
#pragma unroll
    for (int i = 0; i < K; ++i) w[i] = peek(from[i]);
#pragma unroll
    for (int i = 0; i < K; ++i) {
        while (uint32_t(w[i] >> 32) != tag) w[i] = peek(from[i]);
        data[i] = uint32_t(w[i]);
    }
}
__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

static constexpr int kTokenThreads = 256, kTokenWarps = 8, kTokenSequences = 2, kTokenTiles = 4, kTokenAhead = 3;

struct TokenLayer {  // where a layer's parameters and state lie
    const bf16 *in, *out, *gate_up, *down;
    const float *norm1, *norm2, *res1, *res2, *dt_bias, *A_log;
    float* S;  // null: attention
    bf16 *k, *v;
};
struct TokenPlan {
    int B, D, F, L, H, Hkv, P, N, V, logits_ld, splits, blocks;
    int in_width[2];  // of an SSD layer, of an attention layer: multiples of 8
    int64 capacity;
    float eps;
    bool decay;
    // Shared memory in bytes: the layers | per warp: in, out, gate_up, down | activations | sums of the warps | squares
    int row_d, row_f;                             // from row to row of a matrix: 1/8 of D or F, and 16 bytes more
    int out_at, gate_up_at, down_at, warp_bytes;  // within a warp's share
    int weights_at, x_at, x_row, sums_at, squares_at, shared;
    // The head's tiles of 16 rows take the places of in | out | gate_up | down: the first tile of each, and how many in all.
    int slots[5];
};
struct TokenArgs {
    const TokenLayer* layers;
    const float *embed, *final_norm, *cos_qk, *sin_qk, *cos_cb, *sin_cb;
    const bf16* head;
    const int32_t* tokens;
    const DecodeCursor* cursor;
    Ranked* best;
    float* logits;
    Word *x, *proj, *y, *mid, *h, *partial;
    int vocab;
    uint32_t tag;  // layer i's is tag + i + 1
};

struct Share {
    int first, count;
};
__host__ __device__ inline Share share_of(int units, int block, int blocks) {
    const int first = int(int64(units) * block / blocks);
    return {first, int(int64(units) * (block + 1) / blocks) - first};
}
static bool plan_token(TokenPlan* t, const Config& c, int64 B, int64 capacity, int blocks, size_t shared_limit) {
    const bool fits = B <= kTokenSequences && c.D % 256 == 0 && c.F % 256 == 0 && c.N % 4 == 0 && c.N <= 128 &&
                      c.P() % 16 == 0 && c.P() <= 128 && c.H % 2 == 0 && c.V < (1 << 30);
    if (!fits) return false;
    blocks = int(std::min<int64>({blocks, c.D / 2, c.F / 2}));  // each has rows of every matrix
    *t = {};
    t->B = int(B);
    t->D = int(c.D);
    t->F = int(c.F);
    t->L = int(c.L);
    t->H = int(c.H);
    t->Hkv = int(c.Hkv);
    t->P = int(c.P());
    t->N = int(c.N);
    t->V = int(c.V);
    t->logits_ld = int(padded8(c.V));
    t->blocks = blocks;
    t->in_width[0] = int(padded8(c.ssd_width()));
    t->in_width[1] = int(padded8(c.attn_width()));
    t->capacity = capacity;
    t->eps = float(c.norm_eps);
    t->decay = c.ssd_decay;
    t->splits = int(std::max<int64>(1, std::min<int64>({blocks / (B * c.H), 32, ceil_div(capacity, 32)})));
    const auto most = [&](int units) { return int(ceil_div(units, blocks)); };
    const int in_rows = 2 * most(std::max(t->in_width[0], t->in_width[1]) / 2), d_rows = 2 * most(t->D / 2),
              gate_rows = 4 * most(t->F / 2);
    if (std::max({in_rows, d_rows, gate_rows}) > 16 * kTokenTiles || gate_rows * B > kTokenThreads ||
        in_rows * B > kTokenThreads)
        return false;
    t->row_d = 2 * t->D / kTokenWarps + 16;
    t->row_f = 2 * t->F / kTokenWarps + 16;
    int bytes[4] = {in_rows * t->row_d, d_rows * t->row_d, gate_rows * t->row_d, d_rows * t->row_f};
    for (int i = 0; i < 4; ++i) {
        const int slot = 16 * t->row_d, wanted = kTokenAhead + 1 - t->slots[i];
        if (i == 3) bytes[i] = std::max(bytes[i], wanted * slot);
        t->slots[i + 1] = t->slots[i] + bytes[i] / slot;
    }
    t->out_at = bytes[0];
    t->gate_up_at = t->out_at + bytes[1];
    t->down_at = t->gate_up_at + bytes[2];
    t->warp_bytes = t->down_at + bytes[3];
    t->weights_at = int(round_up(int64(sizeof(TokenLayer)) * c.L, 16));
    t->x_at = t->weights_at + kTokenWarps * t->warp_bytes;
    t->x_row = 2 * std::max(t->D, t->F) + 16;
    const int softmax_bytes = kTokenThreads / (c.P() > 64 ? 16 : 8) * ((c.P() > 64 ? 128 : 64) + 2) * 4;
    t->sums_at = t->x_at + int(round_up(std::max(int(B) * t->x_row, softmax_bytes), 16));
    t->squares_at = t->sums_at + 4 * kTokenWarps * int(B) * std::max({in_rows, gate_rows, 32});
    t->shared = t->squares_at + 4 * kTokenWarps * kTokenSequences;
    return size_t(t->shared) <= shared_limit;
}

// kLanes: lanes that share a key of attention, 8 of its P numbers each.
template <int kLanes>
__global__ void __launch_bounds__(kTokenThreads, 1)
    token_kernel(const __grid_constant__ TokenPlan n, const __grid_constant__ TokenArgs g) {
    extern __shared__ __align__(16) unsigned char shared[];
    TokenLayer* layers = reinterpret_cast<TokenLayer*>(shared);
    const int thread = int(threadIdx.x), warp = thread / 32, lane = lane_id(), block = int(blockIdx.x), B = n.B;
    unsigned char* place = shared + n.weights_at + warp * n.warp_bytes;
    unsigned char* act = shared + n.x_at;  // activations (B,K), rows n.x_row bytes apart
    float* sums = reinterpret_cast<float*>(shared + n.sums_at);
    float* squares = reinterpret_cast<float*>(shared + n.squares_at);  // (warps,B)
    const Share own = share_of(n.D / 2, block, n.blocks), own_h = share_of(n.F / 2, block, n.blocks);
    const Share own_tiles = share_of((n.V + 15) / 16, block, n.blocks);
    const int columns = n.D / kTokenWarps, half_d = n.D / 2;

    // ---- Weights: the copy of a matrix, one group each, in the order in, out, gate_up, down, in, ...
    const auto copy_rows = [&](unsigned char* to, int to_row, const bf16* from, int64 ld, int rows, int width) {
        from += warp * width;
        for (int r = lane / 4; r < rows; r += 8)
            for (int c = lane % 4 * 8; c < width; c += 32)
                asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(
                                 uint32_t(__cvta_generic_to_shared(to + r * to_row + 2 * c))),
                             "l"(from + r * ld + c)
                             : "memory");
    };
    const auto in_share = [&](int i) { return share_of(n.in_width[layers[i].S ? 0 : 1] / 2, block, n.blocks); };
    const auto head_slot = [&](int slot) {
        int kind = 3;
        while (slot < n.slots[kind]) --kind;
        const int at[4] = {0, n.out_at, n.gate_up_at, n.down_at};
        return place + at[kind] + (slot - n.slots[kind]) * 16 * n.row_d;
    };
    const auto fill_head = [&](int tile, int slot) {
        if (tile >= own_tiles.count) return;
        const int first = (own_tiles.first + tile) * 16;
        copy_rows(head_slot(slot), n.row_d, g.head + int64(first) * n.D, n.D, min(16, n.V - first), columns);
    };
    const auto fill = [&](int kind, int i) {
        if (i < n.L) {
            const TokenLayer& l = layers[i];
            if (kind == 0) {
                const Share s = in_share(i);
                copy_rows(place, n.row_d, l.in + int64(2 * s.first) * n.D, n.D, 2 * s.count, columns);
            } else if (kind == 1) {
                copy_rows(place + n.out_at, n.row_d, l.out + int64(2 * own.first) * n.D, n.D, 2 * own.count, columns);
            } else if (kind == 2) {  // rows in the order gate, up, gate, up
                const bf16* from = l.gate_up + int64(2 * own_h.first) * n.D;
                unsigned char* to = place + n.gate_up_at;
                copy_rows(to, 2 * n.row_d, from, n.D, 2 * own_h.count, columns);
                copy_rows(to + n.row_d, 2 * n.row_d, from + int64(n.F) * n.D, n.D, 2 * own_h.count, columns);
            } else {
                copy_rows(place + n.down_at, n.row_f, l.down + int64(2 * own.first) * n.F, n.F, 2 * own.count,
                          n.F / kTokenWarps);
            }
        } else {
            for (int slot = n.slots[kind]; slot < n.slots[kind + 1]; ++slot) fill_head(slot, slot);
        }
        copies_commit();
    };

    // ---- Activations of all sequences into shared memory, with the barrier after it. fetch(i, b, j): pair j of sequence b,
    // word i. With a norm's weights: x * weight, and the sum of squares for rstd.
    const auto gather = [&](int K, const float* weight, auto ask, auto fetch) {
        const int half = K / 2, total = B * half;
        float square[kTokenSequences] = {};
        constexpr int kBatch = 6;
        for (int base = thread; base < total; base += kTokenThreads * kBatch) {
            Word words[kBatch];
            float2 w[kBatch];
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const int i = base + u * kTokenThreads;
                if (i >= total) continue;
                words[u] = ask(i);
                if (weight) w[u] = reinterpret_cast<const float2*>(weight)[i % half];
            }
#pragma unroll
            for (int u = 0; u < kBatch; ++u) {
                const int i = base + u * kTokenThreads;
                if (i >= total) continue;
                const int b = i >= half, j = i - b * half;
                uint32_t pair = fetch(words[u], i, b, j);
                if (weight) {
                    const float x0 = low_half(pair), x1 = high_half(pair), s = x0 * x0 + x1 * x1;
#pragma unroll
                    for (int k = 0; k < kTokenSequences; ++k) square[k] += k == b ? s : 0.0f;
                    pair = Rows<bf16, 16>::pack(x0 * w[u].x, x1 * w[u].y);
                }
                *reinterpret_cast<uint32_t*>(act + b * n.x_row + 4 * j) = pair;
            }
        }
        if (weight)
#pragma unroll
            for (int b = 0; b < kTokenSequences; ++b)
                if (b < B) {
                    const float s = warp_sum(square[b]);
                    if (lane == 0) squares[warp * B + b] = s;
                }
        __syncthreads();  // the activations are there, and each warp's copies, which its lanes waited for
    };
    const auto gather_words = [&](const Word* words, int K, const float* weight, uint32_t tag) {
        copies_wait<3>();  // of the 4 groups under way the oldest
        gather(
            K, weight, [&](int i) { return peek(words + i); },
            [&](Word w, int i, int, int) {
                while (uint32_t(w >> 32) != tag) w = peek(words + i);
                return uint32_t(w);
            });
    };
    const auto rstd = [&](int b) {
        float s = 0;
        for (int w = 0; w < kTokenWarps; ++w) s += squares[w * B + b];
        return rsqrtf(s / float(n.D) + n.eps);
    };

    // ---- Products: this warp's columns of `rows` rows times the activations, into `to`: (warps, B, rows)
    const auto product = [&](float* to, const unsigned char* weights, int row_bytes, int rows, int width) {
        float acc[kTokenTiles][4] = {};
        const int tiles = (rows + 15) / 16;
        const bool mine = lane / 4 < B;
        const unsigned char* x = act + lane / 4 * n.x_row + 2 * (warp * width + acc_col());
        const auto operand = [&](uint32_t(&b)[2], int k) {
            b[0] = mine ? *reinterpret_cast<const uint32_t*>(x + 2 * k) : 0;
            b[1] = mine ? *reinterpret_cast<const uint32_t*>(x + 2 * k + 16) : 0;
        };
        const auto step = [&](float(&d)[4], const uint32_t(&b)[2], int tile, int k) {
            uint32_t a[4];
            const int r = min(tile * 16 + lane % 16, rows - 1);
            load_matrices<false>(a, reinterpret_cast<const bf16*>(weights + r * row_bytes) + k + lane / 16 * 8);
            mma16816(d, a, b[0], b[1]);
        };
        uint32_t b[2];
        if (tiles == 1) {  // four sums side by side: a product waits for the one before it
            for (int k0 = 0; k0 < width; k0 += 16 * kTokenTiles)
#pragma unroll
                for (int t = 0; t < kTokenTiles; ++t)
                    if (k0 + 16 * t < width) {
                        operand(b, k0 + 16 * t);
                        step(acc[t], b, 0, k0 + 16 * t);
                    }
#pragma unroll
            for (int i = 0; i < 4; ++i) acc[0][i] = acc[0][i] + acc[1][i] + (acc[2][i] + acc[3][i]);
        } else {
#pragma unroll 2
            for (int k = 0; k < width; k += 16) {
                operand(b, k);
#pragma unroll
                for (int t = 0; t < kTokenTiles; ++t)
                    if (t < tiles) step(acc[t], b, t, k);
            }
        }
        to += warp * rows * B;
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int row = 16 * t + acc_row() + i / 2 * 8, b_ = acc_col() + i % 2;
                if (t < tiles && row < rows && b_ < B) to[b_ * rows + row] = acc[t][i];
            }
        __syncthreads();  // all parts of the sums are there
    };
    // Sum `o` of (B, rows), or 0 beyond them.
    const auto sum_of = [&](const float* from, int o, int rows) {
        float s = 0;
        if (o < rows * B)
#pragma unroll
            for (int w = 0; w < kTokenWarps; ++w) s += from[w * rows * B + o];
        return s;
    };

    // ---- Begin: the list of layers, the first layer's weights, what does not change from layer to layer
    for (int i = thread; i < n.L * int(sizeof(TokenLayer) / 8); i += kTokenThreads)
        reinterpret_cast<Word*>(layers)[i] = reinterpret_cast<const Word*>(g.layers)[i];
    __syncthreads();
    for (int kind = 0; kind < 4; ++kind) fill(kind, 0);
    const int64 past = g.cursor->position;
    const int own_rows = 2 * own.count, half_n = n.N / 2;
    const int b_own = thread / own_rows, row_own = 2 * own.first + thread % own_rows;  // of the residual stream
    const bool owns = thread < own_rows * B;
    float x_own = owns ? to_float(from_float<bf16>(g.embed[int64(g.tokens[b_own]) * n.D + row_own])) : 0.0f;
    float2 turn_c{}, turn_s{};  // of this lane's two pairs of C and B
    if (2 * lane < half_n && g.cos_cb) {
        turn_c = reinterpret_cast<const float2*>(g.cos_cb + past * half_n)[lane];
        turn_s = reinterpret_cast<const float2*>(g.sin_cb + past * half_n)[lane];
    }
    // What the mixer of layer i reads beside the weights, into the L2 cache.
    constexpr int kGroups = kTokenThreads / kLanes;
    const int items = B * n.H * n.P / 2, units = B * n.H * n.splits;
    const int64 per_split = (past + n.splits - 1) / n.splits, kv_row = int64(n.Hkv) * n.P;
    const auto prefetch_state = [&](int i) {
        if (i >= n.L) return;
        const TokenLayer& l = layers[i];
        if (l.S) {
            for (int it = block + n.blocks * warp; it < items; it += n.blocks * kTokenWarps)
                if (8 * lane < 2 * n.N) prefetch(l.S + int64(it) * 2 * n.N + 8 * lane);
        } else {
            for (int u = block; u < units; u += n.blocks) {
                const int split = u % n.splits, h = u / n.splits % n.H, b = u / n.splits / n.H;
                const int64 first = split * per_split, last = min(past, min(first + per_split, first + 16 * kGroups));
                const int64 at = b * n.capacity * kv_row + h / (n.H / n.Hkv) * n.P + thread % kLanes * 8;
                for (int64 s = first + thread / kLanes; s < last; s += kGroups)
                    if (thread % kLanes % 4 == 0) {
                        prefetch(l.k + at + s * kv_row);
                        prefetch(l.v + at + s * kv_row);
                    }
            }
        }
        const float* small[4] = {l.norm1, l.norm2, l.res1, l.res2};
        if (block < 4 && 8 * thread < n.D) prefetch(small[block] + 8 * thread);
        if (block == 4 && l.S && 8 * thread < n.H) {
            prefetch(l.dt_bias + 8 * thread);
            prefetch(l.A_log + 8 * thread);
        }
    };
    prefetch_state(0);

    for (int i = 0; i < n.L; ++i) {
        const TokenLayer& l = layers[i];
        const uint32_t tag = g.tag + uint32_t(i) + 1;
        const Share in = in_share(i);
        const int width = n.in_width[l.S ? 0 : 1], rows = 2 * in.count;
        const float res1 = owns ? l.res1[row_own] : 0, res2 = owns ? l.res2[row_own] : 0;

        // ---- x -> projection = rstd W (x * norm1)
        if (i == 0) {
            copies_wait<3>();
            gather(
                n.D, l.norm1, [](int) { return Word(0); },
                [&](Word, int, int b, int j) {
                    const float* e = g.embed + int64(g.tokens[b]) * n.D + 2 * j;
                    return Rows<bf16, 16>::pack(e[0], e[1]);
                });
        } else {
            gather_words(g.x, n.D, l.norm1, tag - 1);
        }
        product(sums, place, n.row_d, rows, columns);
        {
            const int b = min(thread / rows, B - 1);
            const float v = sum_of(sums, thread, rows) * rstd(b), next = __shfl_down_sync(~0u, v, 1);
            if (thread < rows * B && thread % 2 == 0)
                send(g.proj + b * (width / 2) + in.first + thread % rows / 2, Rows<bf16, 16>::pack(v, next), tag);
        }
        fill(0, i + 1);
        prefetch_state(i + 1);

        // ---- projection -> y
        const int width2 = width / 2;
        if (l.S) {  // one warp per two rows of a state, a lane per two pairs (j, j + N/2)
            for (int it = block + n.blocks * warp; it < items; it += n.blocks * kTokenWarps) {
                const int p = it % (n.P / 2) * 2, h = it / (n.P / 2) % n.H, b = it / (n.P / 2) / n.H;
                const bool on = 2 * lane < half_n;
                const int j = on ? lane : 0;
                float2* s0 = reinterpret_cast<float2*>(l.S + int64(it) * 2 * n.N) + j;
                float2 *s1 = s0 + half_n / 2, *s2 = s1 + half_n / 2, *s3 = s2 + half_n / 2;
                float2 a0 = *s0, a1 = *s1, a2 = *s2, a3 = *s3;
                const float bias = l.dt_bias[h], log = l.A_log[h];
                const Word* from = g.proj + b * width2;
                const int hn = n.H * n.N / 2, c = h * half_n + j;
                const Word* const where[6] = {from + c,
                                              from + c + half_n / 2,
                                              from + hn + c,
                                              from + hn + c + half_n / 2,
                                              from + 2 * hn + (h * n.P + p) / 2,
                                              from + 2 * hn + (n.D + h) / 2};
                uint32_t w[6];
                receive(w, where, tag);
                const float dt = softplus((h % 2 ? high_half(w[5]) : low_half(w[5])) + bias);
                const float a = n.decay ? expf(-expf(log) * dt) : 1.0f;
                const float x0 = dt * low_half(w[4]), x1 = dt * high_half(w[4]);
                const auto turn = [&](float2* lo, float2* hi, uint32_t wl, uint32_t wh) {
                    const float l0 = low_half(wl), l1 = high_half(wl), h0 = low_half(wh), h1 = high_half(wh);
                    *lo = {l0 * turn_c.x - h0 * turn_s.x, l1 * turn_c.y - h1 * turn_s.y};
                    *hi = {h0 * turn_c.x + l0 * turn_s.x, h1 * turn_c.y + l1 * turn_s.y};
                };
                float2 c_lo, c_hi, b_lo, b_hi;
                turn(&c_lo, &c_hi, w[0], w[1]);
                turn(&b_lo, &b_hi, w[2], w[3]);
                a0 = {a * a0.x + x0 * b_lo.x, a * a0.y + x0 * b_lo.y};
                a1 = {a * a1.x + x0 * b_hi.x, a * a1.y + x0 * b_hi.y};
                a2 = {a * a2.x + x1 * b_lo.x, a * a2.y + x1 * b_lo.y};
                a3 = {a * a3.x + x1 * b_hi.x, a * a3.y + x1 * b_hi.y};
                float y0 = a0.x * c_lo.x + a0.y * c_lo.y + (a1.x * c_hi.x + a1.y * c_hi.y);
                float y1 = a2.x * c_lo.x + a2.y * c_lo.y + (a3.x * c_hi.x + a3.y * c_hi.y);
                y0 = warp_sum(on ? y0 : 0.0f);
                y1 = warp_sum(on ? y1 : 0.0f);
                if (lane == 0) send(g.y + b * half_d + (h * n.P + p) / 2, Rows<bf16, 16>::pack(y0, y1), tag);
                if (on) {
                    *s0 = a0;
                    *s1 = a1;
                    *s2 = a2;
                    *s3 = a3;
                }
            }
        } else {
            // A block per split of a head; the last one also takes the new key and value, and appends them.
            const int group = thread / kLanes, e = thread % kLanes * 8, half = n.P / 2,
                      pair = e < half ? e + half : e - half;
            float(*joined)[8 * kLanes + 2] = reinterpret_cast<float(*)[8 * kLanes + 2]>(act);
            for (int u = block; u < units; u += n.blocks) {
                const int split = u % n.splits, h = u / n.splits % n.H, b = u / n.splits / n.H, hkv = h / (n.H / n.Hkv);
                const int64 first = split * per_split, last = min(past, first + per_split);
                const bool on = e < n.P;
                const int at = on ? e : 0, other = on ? pair : half;
                const float sign = e < half ? -1.0f : 1.0f;
                float cs[8], sn[8];
                load<8>(cs, g.cos_qk + past * half + at % half);
                load<8>(sn, g.sin_qk + past * half + at % half);
                const auto turned = [&](float(&f)[8], int head) {  // of q or the new k
                    const Word* from = g.proj + b * width2 + head * n.P / 2;
                    const Word* const where[8] = {from + at / 2,        from + at / 2 + 1,   from + at / 2 + 2,
                                                  from + at / 2 + 3,    from + other / 2,    from + other / 2 + 1,
                                                  from + other / 2 + 2, from + other / 2 + 3};
                    uint32_t w[8];
                    receive(w, where, tag);
#pragma unroll
                    for (int k = 0; k < 8; ++k) {
                        const float x = k % 2 ? high_half(w[k / 2]) : low_half(w[k / 2]);
                        const float z = k % 2 ? high_half(w[4 + k / 2]) : low_half(w[4 + k / 2]);
                        f[k] = on ? x * cs[k] + sign * z * sn[k] : 0.0f;
                    }
                };
                float q[8];
                turned(q, h);
                const float log2_scale = kLog2e * rsqrtf(float(n.P));
#pragma unroll
                for (int k = 0; k < 8; ++k) q[k] *= log2_scale;
                bf16* keys = l.k + b * n.capacity * kv_row + hkv * n.P;
                bf16* values = l.v + b * n.capacity * kv_row + hkv * n.P;
                OnlineSoftmax mean;
                attend<kLanes, true>(mean, q, keys, values, kv_row, first, last, group, kGroups, e, n.P);
                if (split == n.splits - 1) {
                    float key[1][8], value[1][8];
                    turned(key[0], n.H + hkv);
                    const Word* from = g.proj + b * width2 + ((n.H + n.Hkv + hkv) * n.P + at) / 2;
                    const Word* const where[4] = {from, from + 1, from + 2, from + 3};
                    uint32_t w[4];
                    receive(w, where, tag);
#pragma unroll
                    for (int k = 0; k < 8; ++k) value[0][k] = k % 2 ? high_half(w[k / 2]) : low_half(w[k / 2]);
                    const float score[1] = {score_of<kLanes>(q, key[0])};
                    if (group == 0) {
                        mean.add(score, value);
                        if (on && h % (n.H / n.Hkv) == 0) {
                            store<8>(keys + past * kv_row + e, key[0]);
                            store<8>(values + past * kv_row + e, value[0]);
                        }
                    }
                }
#pragma unroll
                for (int k = 0; k < 8; ++k) joined[group][e + k] = mean.out[k];
                joined[group][8 * kLanes] = mean.top;
                joined[group][8 * kLanes + 1] = mean.sum;
                __syncthreads();  // the groups' sums are there
                float out = 0, top, sum;
                join_groups<kGroups, 8 * kLanes>(&out, &top, &sum, joined, thread, n.P);
                Word* to = g.partial + int64(u) * (n.P + 2);
                if (thread < n.P) send(to + thread, __float_as_uint(out), tag);
                if (thread == 0) {
                    send(to + n.P, __float_as_uint(top), tag);
                    send(to + n.P + 1, __float_as_uint(sum), tag);
                }
                __syncthreads();  // they have been read
            }
            // One warp per two numbers of a head: lane s has split s.
            for (int it = block + n.blocks * warp; it < items; it += n.blocks * kTokenWarps) {
                const int p = it % (n.P / 2) * 2, head = it / (n.P / 2);
                const Word* from = g.partial + int64(head * n.splits + min(lane, n.splits - 1)) * (n.P + 2);
                const Word* const where[4] = {from + p, from + p + 1, from + n.P, from + n.P + 1};
                uint32_t w[4];
                receive(w, where, tag);
                float top = __uint_as_float(w[2]);
#pragma unroll
                for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                const float scale = lane < n.splits ? exp2_fast(__uint_as_float(w[2]) - top) : 0.0f;
                const float sum = warp_sum(scale * __uint_as_float(w[3]));
                const float y0 = warp_sum(scale * __uint_as_float(w[0])), y1 = warp_sum(scale * __uint_as_float(w[1]));
                if (lane == 0) send(g.y + head * (n.P / 2) + p / 2, Rows<bf16, 16>::pack(y0 / sum, y1 / sum), tag);
            }
        }

        // ---- y -> x_mid = res1 * x + W y
        const auto residual = [&](Word* to, float res) {
            x_own = to_float(from_float<bf16>(res * x_own + sum_of(sums, thread, own_rows)));
            const float next = __shfl_down_sync(~0u, x_own, 1);
            if (owns && thread % 2 == 0)
                send(to + b_own * half_d + row_own / 2, Rows<bf16, 16>::pack(x_own, next), tag);
        };
        gather_words(g.y, n.D, nullptr, tag);
        product(sums, place + n.out_at, n.row_d, own_rows, columns);
        residual(g.mid, res1);
        fill(1, i + 1);

        // ---- x_mid -> h = silu(gate) * up, rows in the order gate, up, gate, up
        gather_words(g.mid, n.D, l.norm2, tag);
        const int rows_h = 4 * own_h.count;
        product(sums, place + n.gate_up_at, n.row_d, rows_h, columns);
        {
            const int b = min(thread / rows_h, B - 1);
            const float v = sum_of(sums, thread, rows_h) * rstd(b), up = __shfl_down_sync(~0u, v, 1);
            const float h = v / (1.0f + exp2_fast(-v * kLog2e)) * up, next = __shfl_down_sync(~0u, h, 2);
            if (thread < rows_h * B && thread % 4 == 0)
                send(g.h + b * (n.F / 2) + own_h.first + thread % rows_h / 4, Rows<bf16, 16>::pack(h, next), tag);
        }
        fill(2, i + 1);

        // ---- h -> x = res2 * x_mid + W h
        gather_words(g.h, n.F, nullptr, tag);
        product(sums, place + n.down_at, n.row_f, own_rows, n.F / kTokenWarps);
        residual(g.x, res2);
        fill(3, i + 1);
    }

    // ---- x -> logits, 16 rows at a time; the best of this block's
    gather_words(g.x, n.D, g.final_norm, g.tag + uint32_t(n.L));
    copies_done();
    __syncwarp();
    Ranked best = 0;
    const int slots = n.slots[4];
    for (int tile = 0; tile < own_tiles.count; ++tile) {
        if (tile >= slots) {
            copies_wait<kTokenAhead>();  // the copy of this tile was begun `slots` tiles ago, each a group of its own
            __syncwarp();
        }
        const int first = (own_tiles.first + tile) * 16, rows = 16;
        float* to = sums + tile % 2 * kTokenWarps * rows * B;
        product(to, head_slot(tile % slots), n.row_d, rows, columns);
        fill_head(tile + slots, tile % slots);
        copies_commit();
        if (thread < rows * B) {
            const int b = thread / rows, row = first + thread % rows;
            const float z = sum_of(to, thread, rows) * rstd(b);
            if (row < n.V) g.logits[int64(b) * n.logits_ld + row] = z;
            if (row < g.vocab) best = max(best, ranked(z, row));
        }
    }
#pragma unroll
    for (int d = 8; d > 0; d /= 2) best = max(best, __shfl_xor_sync(~0u, best, d));
    if (thread < 16 * B && thread % 16 == 0) atomicMax(g.best + thread / 16, best);
}

// ---------------------------------------------------------------------------------------------------------------------
// 12  The model
// ---------------------------------------------------------------------------------------------------------------------

// Device memory that frees itself.
class Memory {
  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { cudaFree(base); }
    void reset() {
        cudaFree(base);
        base = nullptr;
        bytes = 0;
    }
    void resize(size_t n, const char* what) {
        reset();
        if (n == 0) return;
        if (cudaMalloc(&base, n) != cudaSuccess) {
            cudaGetLastError();
            base = nullptr;
            size_t free = 0, total = 0;
            cudaMemGetInfo(&free, &total);
            fail("GPU: %s needs %s, %s are free; a smaller --batch, --seq-len or model needs less", what,
                 byte_text(double(n)).c_str(), byte_text(double(free)).c_str());
        }
        bytes = n;
    }
    size_t size() const { return bytes; }
    template <class T = char>
    T* at(size_t offset = 0) const {
        return reinterpret_cast<T*>(static_cast<char*>(base) + offset);
    }

  private:
    void* base = nullptr;
    size_t bytes = 0;
};

// Hands out pieces of one allocation. Without memory behind it, it only counts: the plan is made first, then carried
// out.
struct Arena {
    char* base = nullptr;
    size_t used = 0;
    template <class T>
    void take(T** p, int64 n) {
        *p = base ? reinterpret_cast<T*>(base + used) : nullptr;
        used += (size_t(n) * sizeof(T) + 255) / 256 * 256;
    }
};

// What one layer's forward keeps for its backward, rows = B*T.
template <class A>
struct LayerActivations {
    A* x;                 // (rows,D) input
    float* rstd1;         // (rows)
    A* u1;                // (rows,D) first norm
    A* proj;              // (rows, ssd_width or attn_width, padded8): C|B|X|dt_raw or q|k|v, rotated in place
    float *dt, *dA;       // SSD: (rows,H)
    float* chunk_states;  // SSD: (B,H,chunks,P,N)
    float* lse;           // attention: (rows,H)
    A* y;                 // (rows,D) heads' outputs
    A* x_mid;             // (rows,D) after the first residual
    float* rstd2;         // (rows)
    A* u2;                // (rows,D) second norm
    A *gate_up, *h;       // (rows,2F), (rows,F)
};

static constexpr int64 kDecodeRun = 64;  // tokens decoded before the host looks

template <class A>
struct CudaState : State {
    struct Layer {
        float* S = nullptr;            // SSD: (B,H,P,N)
        A *k = nullptr, *v = nullptr;  // attention: (B,capacity,Hkv,P)
    };
    std::vector<Layer> layers;
    Memory memory;
    // of decode steps, which are recorded
    DecodeCursor* cursor = nullptr;
    Ranked* best = nullptr;              // (B)
    int32_t* chosen = nullptr;           // (kDecodeRun,B)
    float* attention_partial = nullptr;  // (B,H,splits,P+2)
    int64 splits = 1;
    int64 steps = 0, graph_layout = -1, graph_vocab = 0;
    // of the kernel that makes whole tokens, where it can
    bool whole = false;
    TokenPlan token_plan{};
    TokenLayer* token_layers = nullptr;
    Word *x = nullptr, *proj = nullptr, *y = nullptr, *mid = nullptr, *h = nullptr, *partial = nullptr;
    uint32_t tag = 0;
    cudaGraphExec_t graph = nullptr;

    ~CudaState() override { drop_graph(); }
    void drop_graph() {
        if (graph) cudaGraphExecDestroy(graph);
        graph = nullptr;
    }
    CudaState(const Config& c, int64 sequences, int64 tokens) : layers(size_t(c.L)) {
        B = sequences;
        capacity = tokens;
        if (!std::is_same<A, float>::value) {
            int device = 0, blocks = 0, most = 0;
            CHECK_CUDA(cudaGetDevice(&device));
            CHECK_CUDA(cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device));
            CHECK_CUDA(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
            whole = plan_token(&token_plan, c, B, capacity, blocks, size_t(most));
        }
        Arena plan;
        take(&plan, c);
        memory.resize(plan.used, "the state");
        CHECK_CUDA(cudaMemset(memory.at(), 0, memory.size()));
        Arena real{memory.at(), 0};
        take(&real, c);
    }

  private:
    void take(Arena* arena, const Config& c) {
        arena->take(&cursor, 1);
        arena->take(&best, B);
        arena->take(&chosen, kDecodeRun * B);
        splits = attention_splits(B * c.H, capacity);
        if (whole) {
            arena->take(&token_layers, c.L);
            for (Word** words : {&x, &y, &mid}) arena->take(words, B * c.D / 2);
            arena->take(&proj, B * std::max(token_plan.in_width[0], token_plan.in_width[1]) / 2);
            arena->take(&h, B * c.F / 2);
            arena->take(&partial, B * c.H * token_plan.splits * (c.P() + 2));
        }
        if (c.attn_period > 0) arena->take(&attention_partial, B * c.H * splits * (c.P() + 2));
        for (int64 i = 0; i < c.L; ++i) {
            Layer& l = layers[size_t(i)];
            if (c.is_attention(i)) {
                arena->take(&l.k, B * capacity * c.Hkv * c.P());
                arena->take(&l.v, B * capacity * c.Hkv * c.P());
            } else {
                arena->take(&l.S, B * c.H * c.P() * c.N);
            }
        }
    }
};

// A weight matrix (out,in) as the matrix products read it: in A. Rows of its output y are `ld` apart, and where ld >
// out the rounded copy has rows of zeros up to ld, so that y ends in zeros (bf16; fp32 reads the masters, without
// such rows).
struct Matrix {
    int64 master;  // offset in the flat buffers
    int64 copy;    // offset in the rounded copy
    int64 in, out, ld;
};

template <class A>
class Model {
  public:
    static constexpr bool kCopy = !std::is_same<A, float>::value;  // whether A needs a rounded copy of the weights
    const Config config;
    const ParamTable table;
    const SsdTiles tiles;
    cudaStream_t stream = nullptr;

    explicit Model(const Config& c);
    ~Model() {
        if (stream) cudaStreamDestroy(stream);
    }

    float* buffer(Buffer which) {
        Memory& b = buffers[int(which)];
        if (b.size() == 0) {
            b.resize(size_t(table.count) * sizeof(float), buffer_name(which));
            CHECK_CUDA(cudaMemsetAsync(b.at(), 0, b.size(), stream));
        }
        return b.at<float>();
    }
    bool has(Buffer which) const { return buffers[int(which)].size() > 0; }
    void weights_written();  // after the host wrote them: makes the copy
    double forward(const int32_t* tokens_in, const int32_t* targets_in, int64 batch, int64 length, const DropoutKey*,
                   CudaState<A>* state, float* host_logits, bool every_token);
    // Decode steps: each sequence consumes its token of `last` and then, count - 1 times, the one it chose. The logits of
    // the last step and the tokens chosen, (B,count), if they are wanted.
    void decode(CudaState<A>*, const int32_t* last, int64 count, int64 vocab, float* host_logits, int32_t* chosen);
    void backward(double scale);
    double gradient_norm();
    void update(const AdamW&, double lr, int64 step, double grad_scale);
    std::string find_non_finite();
    size_t bytes_for(int64 batch, int64 length) {  // of activations, when training
        Arena plan;
        carve(&plan, batch, length, true);
        const size_t n = plan.used;
        carved = 0;
        return n;
    }

  private:
    Blas blas;
    Memory buffers[4], copy, adamw_tiles, activations, rope_memory, scratch;
    int64 adamw_tile_count = 0, copy_count = 0;
    std::map<std::pair<int64, Param>, Matrix> matrices;  // (layer, first parameter)
    // of the last forward
    std::vector<LayerActivations<A>> layers;
    A *x_final, *u_final;
    float *rstd_final, *losses;
    A* logits;  // (head_rows, padded8(V)): of one part of the rows, or of all if they fit
    int64 head_rows = 0;
    int32_t *tokens, *targets, *order, *start;  // (rows), start (rows + 1)
    std::vector<int32_t> host_tokens;
    int64 B = 0, T = 0, distinct = 0;
    int64 carved = 0, carved_B = 0, carved_T = 0;  // 0: nothing, 1: for training, 2: for inference
    bool has_targets = false, dropout_on = false;
    DropoutKey dropout_key{};
    float *cos_qk = nullptr, *sin_qk = nullptr, *cos_cb = nullptr, *sin_cb = nullptr;
    int64 rope_positions = 0, layout_count = 0;  // how often memory was laid out anew
    // not needed after the op that reads it
    A *m, *dx, *dm, *du, *dy, *dh, *dproj, *dgate_up, *last;
    float *ddt, *ddA, *dyy, *partial, *logits32, *segment_scratch;

    static const char* buffer_name(Buffer which) {
        switch (which) {
            case Buffer::weights: return "the weights";
            case Buffer::gradients: return "the gradients";
            case Buffer::exp_avg: return "the first moments";
            default: return "the second moments";
        }
    }
    const float* w(Param p, int64 layer = -1) const { return buffers[0].at<float>() + table.offset(p, layer); }
    float* g(Param p, int64 layer = -1) const { return buffers[1].at<float>() + table.offset(p, layer); }
    Dropout dropout(int64 layer, int half) const {
        return {dropout_on ? config.dropout : 0.0, dropout_key, uint32_t(2 * layer + half)};
    }
    const Matrix& matrix(Param p, int64 layer) const { return matrices.at({layer, p}); }
    const A* data(const Matrix& x) const {
        return kCopy ? copy.at<A>() + x.copy : reinterpret_cast<const A*>(buffers[0].at<float>() + x.master);
    }
    // y = x W^T; and dx = scale dy W, dW += scale dy^T x
    template <class Y>
    void linear(Y* y, const A* x, const Matrix& a, int64 rows) {
        linear_forward(blas, y, a.ld, x, data(a), rows, a.in, kCopy ? a.ld : a.out, stream);
    }
    void linear_backward(A* d_x, const A* d_y, const A* x, const Matrix& a, int64 rows, float scale = 1) {
        linear_backward_input(blas, d_x, d_y, a.ld, data(a), rows, a.in, kCopy ? a.ld : a.out, scale, stream);
        linear_backward_weight(blas, buffers[1].at<float>() + a.master, d_y, a.ld, x, rows, a.in, a.out, scale, stream);
    }
    void carve(Arena*, int64 batch, int64 length, bool training);
    void prepare(int64 batch, int64 length, bool training);
    void extend_rope(int64 positions);
    void layers_forward(CudaState<A>* state, Position before);
    void decode_step(CudaState<A>* state, int64 vocab);
    void decode_whole(CudaState<A>* state, int64 vocab);
    void decode_mixer(int64 layer, CudaState<A>* state, Position before);
    void check_tokens(const int32_t* ids, int64 n) const {
        for (int64 r = 0; r < n; ++r)
            if (ids[r] < 0 || ids[r] >= config.V)
                fail("token %d is outside the vocabulary of %lld", int(ids[r]), (long long)config.V);
    }
    static void check_room(const CudaState<A>& state, int64 batch, int64 count) {
        if (state.B != batch || state.position + count > state.capacity)
            fail("state has %lld sequences and room for %lld tokens; asked for %lld sequences and %lld tokens",
                 (long long)state.B, (long long)state.capacity, (long long)batch, (long long)(state.position + count));
    }
    void mixer_forward(int64 layer, CudaState<A>* state, Position before);
    void mixer_backward(int64 layer);
};

template <class A>
Model<A>::Model(const Config& c)
    : config(c),
      table(c),
      tiles(c.attn_period == 1 && c.attn_offset == 0 ? SsdTiles{64, 32, 32} : ssd_tiles<A>(c.N, c.P())),
      layers(size_t(c.L)) {
    for (int64 i = 0; i < c.L; ++i)
        if (c.is_attention(i) && c.P() > kAttentionMaxP)
            fail("attention on the GPU: the head dimension is %lld; at most %lld is supported", (long long)c.P(),
                 (long long)kAttentionMaxP);
    // An ordinary stream, which waits for the default one: that is where cudaMemset and cudaMemcpy work, and they may return
    // before they are done.
    CHECK_CUDA(cudaStreamCreate(&stream));

    // The matrices, and where their rounded copies lie: 256 bytes apart, so that each begins aligned.
    const auto add = [&](Param p, int64 layer, int64 out, int64 in, bool pad) {
        const int64 ld = pad ? padded8(out) : out;
        matrices[{layer, p}] = {table.offset(p, layer), copy_count, in, out, ld};
        copy_count += round_up(ld * in, 128);
    };
    for (int64 i = 0; i < c.L; ++i) {
        const bool attention = c.is_attention(i);
        if (attention) add(Param::q_proj, i, c.attn_width(), c.D, true);
        else add(Param::c_proj, i, c.ssd_width(), c.D, true);
        add(attention ? Param::o_proj : Param::out_proj, i, c.D, c.D, false);
        add(Param::gate_proj, i, 2 * c.F, c.D, false);
        add(Param::down_proj, i, c.D, c.F, false);
    }
    add(c.tie ? Param::word_embed : Param::lm_head, -1, c.V, c.D, true);
    if (kCopy) {
        copy.resize(size_t(copy_count) * sizeof(A), "the rounded weights");
        CHECK_CUDA(cudaMemsetAsync(copy.at(), 0, copy.size(), stream));
    }
    // Which parameters have a copy: those inside a matrix.
    std::vector<AdamWTile> list;
    for (const ParamSpec& s : table.specs) {
        int64 to = -1;
        for (const auto& entry : matrices) {
            const Matrix& a = entry.second;
            if (kCopy && s.offset >= a.master && s.offset < a.master + a.out * a.in)
                to = a.copy + (s.offset - a.master);
        }
        for (int64 e = 0; e < s.count; e += kAdamWTile)
            list.push_back({s.offset + e, to < 0 ? -1 : to + e, int32_t(std::min<int64>(kAdamWTile, s.count - e)),
                            s.decay ? 1 : 0});
    }
    adamw_tile_count = int64(list.size());
    adamw_tiles.resize(list.size() * sizeof(AdamWTile), "a list of parameters");
    CHECK_CUDA(cudaMemcpy(adamw_tiles.at(), list.data(), adamw_tiles.size(), cudaMemcpyHostToDevice));
    buffer(Buffer::weights);
}

template <class A>
void Model<A>::weights_written() {
    if (kCopy)
        launch("copy_weights", copy_weights_kernel<A>, adamw_tile_count, 256, 0, stream, copy.at<A>(),
               buffers[0].at<float>(), adamw_tiles.at<AdamWTile>());
}

// Logits of all rows are kept between forward and backward if they are this small; else they are made a part at a time,
// and again in the backward pass.
static constexpr int64 kLogitsKept = int64(8) << 30, kLogitsPart = int64(1) << 30;

// Lays out what a forward pass (and, when training, a backward pass) needs. In inference all layers use the same
// memory.
template <class A>
void Model<A>::carve(Arena* a, int64 batch, int64 length, bool training) {
    const Config& c = config;
    const int64 rows = batch * length, D = c.D, H = c.H, logit_row = padded8(c.V);
    int64 width = 0;  // the wider of the two projections
    for (int64 i = 0; i < c.L; ++i)
        width = std::max(width, padded8(c.is_attention(i) ? c.attn_width() : c.ssd_width()));
    a->take(&tokens, rows);
    a->take(&targets, rows);
    a->take(&order, rows);
    a->take(&start, rows + 1);
    for (int64 i = 0; i < c.L; ++i) {
        LayerActivations<A>& l = layers[size_t(i)];
        if (!training && i > 0) {
            l = layers[0];
            continue;
        }
        const bool attention = c.is_attention(i);
        l = {};
        a->take(&l.x, rows * D);
        a->take(&l.rstd1, rows);
        a->take(&l.u1, rows * D);
        a->take(&l.proj, rows * (!training ? width : padded8(attention ? c.attn_width() : c.ssd_width())));
        if (!training || !attention) {
            a->take(&l.dt, rows * H);
            a->take(&l.dA, rows * H);
        }
        if (training && !attention) a->take(&l.chunk_states, batch * H * ssd_chunks(tiles, length) * c.P() * c.N);
        if (!training || attention) a->take(&l.lse, rows * H);
        a->take(&l.y, rows * D);
        a->take(&l.x_mid, rows * D);
        a->take(&l.rstd2, rows);
        a->take(&l.u2, rows * D);
        a->take(&l.gate_up, rows * 2 * c.F);
        a->take(&l.h, rows * c.F);
    }
    a->take(&m, rows * D);
    a->take(&segment_scratch, ssd_scratch({batch, length, H, c.P(), c.N, c.Q, 0}, tiles));
    if (training) a->take(&x_final, rows * D);
    else x_final = layers[0].x;
    a->take(&u_final, rows * D);
    a->take(&rstd_final, rows);
    if (!training) {
        head_rows = length == 1 ? rows : std::min(rows, std::max<int64>(1, kLogitsPart / 4 / logit_row));
        a->take(&last, batch * D);
        a->take(&logits32, head_rows * logit_row);
        return;
    }
    const int64 row_bytes = logit_row * int64(sizeof(A));
    head_rows = rows <= kLogitsKept / row_bytes ? rows : std::max<int64>(1, kLogitsPart / row_bytes);
    a->take(&logits, head_rows * logit_row);
    a->take(&losses, rows);
    a->take(&dx, rows * D);
    if (c.dropout > 0) a->take(&dm, rows * D);
    else dm = dx;
    a->take(&du, rows * D);
    a->take(&dy, rows * D);
    a->take(&dh, rows * c.F);
    a->take(&dproj, rows * width);
    a->take(&dgate_up, rows * 2 * c.F);
    a->take(&ddt, rows * H);
    a->take(&ddA, rows * H);
    a->take(&dyy, rows * H);
    a->take(&partial, kPartialBlocks * 2 * std::max(D, H));
}

template <class A>
void Model<A>::prepare(int64 batch, int64 length, bool training) {
    const int64 mode = training ? 1 : 2;
    if (carved == mode && carved_B == batch && carved_T == length) return;
    carved = 0;
    Arena plan;
    carve(&plan, batch, length, training);
    if (plan.used > activations.size()) {
        CHECK_CUDA(cudaStreamSynchronize(stream));
        activations.reset();
        size_t free = 0, total = 0;
        CHECK_CUDA(cudaMemGetInfo(&free, &total));
        if (plan.used > free) {
            int64 fits = 0, too_many = batch;  // bisect for the largest batch that fits
            while (too_many - fits > 1) {
                const int64 middle = (fits + too_many) / 2;
                Arena smaller;
                carve(&smaller, middle, length, training);
                (smaller.used <= free ? fits : too_many) = middle;
            }
            const std::string advice = fits > 0 ? format("a batch of %lld fits", (long long)fits)
                                                : std::string("not even a batch of 1 fits: shorten --seq-len");
            fail("GPU: %lld x %lld tokens need %s of memory, %s are free; %s", (long long)batch, (long long)length,
                 byte_text(double(plan.used)).c_str(), byte_text(double(free)).c_str(), advice.c_str());
        }
        activations.resize(plan.used, "a forward pass");
    }
    Arena real{activations.at(), 0};
    carve(&real, batch, length, training);
    ++layout_count;
    carved = mode;
    carved_B = batch;
    carved_T = length;
}

template <class A>
void Model<A>::extend_rope(int64 positions) {
    if (positions <= rope_positions) return;
    ref::RopeTable<float> qk, cb;
    qk.extend(config.P(), config.rope_theta, std::max(positions, 2 * rope_positions));
    cb.extend(config.N, config.rope_theta, qk.positions);
    CHECK_CUDA(cudaStreamSynchronize(stream));
    ++layout_count;
    Arena plan;
    for (int pass = 0; pass < 2; ++pass) {
        plan.take(&cos_qk, int64(qk.cos.size()));
        plan.take(&sin_qk, int64(qk.cos.size()));
        plan.take(&cos_cb, int64(cb.cos.size()));
        plan.take(&sin_cb, int64(cb.cos.size()));
        if (pass == 0) {
            rope_memory.resize(plan.used, "the table of positions");
            plan = {rope_memory.at(), 0};
        }
    }
    const auto upload = [](float* to, const std::vector<float>& from) {
        CHECK_CUDA(cudaMemcpy(to, from.data(), from.size() * sizeof(float), cudaMemcpyHostToDevice));
    };
    upload(cos_qk, qk.cos);
    upload(sin_qk, qk.sin);
    upload(cos_cb, cb.cos);
    upload(sin_cb, cb.sin);
    rope_positions = qk.positions;
}

// As the reference's: without a state, whole sequences from position 0, with activations kept for the backward pass;
// with one, T further tokens of each sequence, and the logits go to the host.
template <class A>
double Model<A>::forward(const int32_t* tokens_in, const int32_t* targets_in, int64 batch, int64 length,
                         const DropoutKey* key, CudaState<A>* state, float* host_logits, bool every_token) {
    const Config& c = config;
    if (batch < 1 || length < 1)
        fail("%lld sequences of %lld tokens: expected at least one of each", (long long)batch, (long long)length);
    const int64 rows = batch * length, D = c.D;
    if (rows > INT32_MAX) fail("%lld tokens at once: expected at most 2^31-1", (long long)rows);
    check_tokens(tokens_in, rows);
    if (targets_in) check_tokens(targets_in, rows);
    const int64 pos0 = state ? state->position : 0;
    if (state) check_room(*state, batch, length);
    if (state && length == 1) {
        decode(state, tokens_in, 1, c.V, host_logits, nullptr);
        return 0;
    }
    const bool training = !state;
    has_targets = false;  // backward() needs a forward that had some
    prepare(batch, length, training);
    extend_rope(pos0 + length);
    B = batch;
    T = length;
    dropout_on = key && c.dropout > 0;
    if (key) dropout_key = *key;
    const auto upload = [&](int32_t* to, const int32_t* from, int64 n) {
        CHECK_CUDA(cudaMemcpyAsync(to, from, size_t(n) * sizeof(int32_t), cudaMemcpyHostToDevice, stream));
    };
    upload(tokens, tokens_in, rows);
    if (targets_in) {
        host_tokens.assign(tokens_in, tokens_in + rows);
        std::vector<int32_t> host_order, host_start;
        distinct = sort_by_token(&host_order, &host_start, host_tokens, c.V);
        upload(targets, targets_in, rows);
        upload(order, host_order.data(), rows);
        upload(start, host_start.data(), distinct + 1);
    }
    if (profile) profile->mark("upload", stream);

    layers_forward(state, pos0);
    const Matrix& head = matrix(c.tie ? Param::word_embed : Param::lm_head, -1);
    if (state) {
        state->position += length;
        const A* u = u_final;
        int64 n = rows;
        if (!every_token) {
            n = batch;
            u = last;
            launch("gather_last", gather_last_kernel<A>, ceil_div(n * D, 256), 256, 0, stream, last, u_final, n * D,
                   length, D);
        }
        for (int64 r0 = 0; r0 < n; r0 += head_rows) {
            const int64 part = std::min(head_rows, n - r0);
            linear(logits32, u + r0 * D, head, part);
            CHECK_CUDA(cudaMemcpy2DAsync(host_logits + r0 * c.V, size_t(c.V) * 4, logits32, size_t(head.ld) * 4,
                                         size_t(c.V) * 4, size_t(part), cudaMemcpyDeviceToHost, stream));
        }
        CHECK_CUDA(cudaStreamSynchronize(stream));
        return 0;
    }
    if (!targets_in) return 0;
    for (int64 r0 = 0; r0 < rows; r0 += head_rows) {
        const int64 part = std::min(head_rows, rows - r0);
        linear(logits, u_final + r0 * D, head, part);
        cross_entropy(losses + r0, logits, targets + r0, part, c.V, head_rows == rows, stream);
    }
    std::vector<float> host(static_cast<size_t>(rows));
    CHECK_CUDA(cudaMemcpyAsync(host.data(), losses, size_t(rows) * 4, cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    has_targets = true;
    double total = 0;
    for (const float l : host) total += double(l);
    return total / double(rows);
}

// tokens -> u_final
template <class A>
void Model<A>::layers_forward(CudaState<A>* state, Position before) {
    const Config& c = config;
    const int64 rows = B * T, D = c.D;
    embedding_forward(layers[0].x, tokens, w(Param::word_embed), rows, D, stream);
    residual_norm_forward<A>(nullptr, layers[0].u1, layers[0].rstd1, layers[0].x, nullptr, nullptr, w(Param::norm1, 0),
                             c.norm_eps, {}, rows, D, stream);
    for (int64 i = 0; i < c.L; ++i) {
        LayerActivations<A>& a = layers[size_t(i)];
        mixer_forward(i, state, before);
        linear(m, a.y, matrix(c.is_attention(i) ? Param::o_proj : Param::out_proj, i), rows);
        residual_norm_forward(a.x_mid, a.u2, a.rstd2, a.x, m, w(Param::res1, i), w(Param::norm2, i), c.norm_eps,
                              dropout(i, 0), rows, D, stream);
        linear(a.gate_up, a.u2, matrix(Param::gate_proj, i), rows);
        swiglu_forward(a.h, a.gate_up, rows, c.F, stream);
        linear(m, a.h, matrix(Param::down_proj, i), rows);
        // and the first norm of the next layer, or the final one
        const bool end = i + 1 == c.L;
        LayerActivations<A>* next = end ? nullptr : &layers[size_t(i + 1)];
        residual_norm_forward(end ? x_final : next->x, end ? u_final : next->u1, end ? rstd_final : next->rstd1,
                              a.x_mid, m, w(Param::res2, i), end ? w(Param::final_norm) : w(Param::norm1, i + 1),
                              c.norm_eps, dropout(i, 1), rows, D, stream);
    }
}

template <class A>
void Model<A>::decode(CudaState<A>* state, const int32_t* last_tokens, int64 count, int64 vocab, float* host_logits,
                      int32_t* chosen) {
    const Config& c = config;
    B = state->B;
    T = 1;
    if (vocab < 1 || vocab > c.V) fail("cannot choose among %lld of %lld tokens", (long long)vocab, (long long)c.V);
    check_tokens(last_tokens, B);
    check_room(*state, B, count);
    has_targets = dropout_on = false;
    prepare(B, 1, false);
    extend_rope(state->position + count);
    CHECK_CUDA(cudaMemcpyAsync(tokens, last_tokens, size_t(B) * sizeof(int32_t), cudaMemcpyHostToDevice, stream));
    std::vector<int32_t> run(size_t(kDecodeRun * B));
    for (int64 made = 0; made < count; made += kDecodeRun) {
        const int64 steps = std::min(kDecodeRun, count - made);
        const DecodeCursor cursor{state->position, 0};
        CHECK_CUDA(cudaMemcpyAsync(state->cursor, &cursor, sizeof cursor, cudaMemcpyHostToDevice, stream));
        for (int64 i = 0; i < steps; ++i) decode_step(state, vocab);
        state->position += steps;
        if (!chosen) continue;
        CHECK_CUDA(cudaMemcpyAsync(run.data(), state->chosen, size_t(steps * B) * sizeof(int32_t),
                                   cudaMemcpyDeviceToHost, stream));
        CHECK_CUDA(cudaStreamSynchronize(stream));
        for (int64 i = 0; i < steps * B; ++i) {
            const int32_t token = run[size_t(i)];
            if (token < 0) fail("the logit of token %d is not a finite number", -1 - token);
            chosen[i % B * count + made + i / B] = token;
        }
    }
    if (host_logits)
        CHECK_CUDA(cudaMemcpy2DAsync(host_logits, size_t(c.V) * 4, logits32, size_t(padded8(c.V)) * 4, size_t(c.V) * 4,
                                     size_t(B), cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
}

// One token of each sequence. Its few hundred launches are small, and starting them one by one would take longer than
// they run: they are recorded once as a graph, which is then replayed. It holds addresses, so that it is recorded
// again when memory has moved.
template <class A>
void Model<A>::decode_step(CudaState<A>* state, int64 vocab) {
    if (state->whole) return decode_whole(state, vocab);
    const auto work = [&] {
        layers_forward(state, {state->position, &state->cursor->position});
        const Matrix& head = matrix(config.tie ? Param::word_embed : Param::lm_head, -1);
        linear(logits32, u_final, head, B);
        launch("best_logit", best_logit_kernel, B, 1024, 0, stream, state->best, logits32, vocab, head.ld);
        launch("choose", choose_kernel, 1, 256, 0, stream, tokens, state->chosen, state->cursor, state->best, B);
    };
    if (state->steps++ == 0 || profile) return work();  // cuBLASLt makes its plans
    if (!state->graph || state->graph_layout != layout_count || state->graph_vocab != vocab) {
        state->drop_graph();
        cudaGraph_t recorded = nullptr;
        CHECK_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
        work();
        CHECK_CUDA(cudaStreamEndCapture(stream, &recorded));
        const cudaError_t e = cudaGraphInstantiate(&state->graph, recorded, 0);
        cudaGraphDestroy(recorded);
        check(e, "cudaGraphInstantiate");
        state->graph_layout = layout_count;
        state->graph_vocab = vocab;
    }
    CHECK_CUDA(cudaGraphLaunch(state->graph, stream));
}

// The same in one kernel.
template <class A>
void Model<A>::decode_whole(CudaState<A>* state, int64 vocab) {
    if constexpr (kCopy) {
        const Config& c = config;
        const TokenPlan& plan = state->token_plan;
        if (state->steps++ == 0) {
            std::vector<TokenLayer> list;
            for (int64 i = 0; i < c.L; ++i) {
                const bool attention = c.is_attention(i);
                const auto& past = state->layers[size_t(i)];
                list.push_back({data(matrix(attention ? Param::q_proj : Param::c_proj, i)),
                                data(matrix(attention ? Param::o_proj : Param::out_proj, i)),
                                data(matrix(Param::gate_proj, i)), data(matrix(Param::down_proj, i)),
                                w(Param::norm1, i), w(Param::norm2, i), w(Param::res1, i), w(Param::res2, i),
                                attention ? nullptr : w(Param::dt_bias, i), attention ? nullptr : w(Param::A_log, i),
                                past.S, past.k, past.v});
            }
            CHECK_CUDA(cudaMemcpyAsync(state->token_layers, list.data(), list.size() * sizeof(TokenLayer),
                                       cudaMemcpyHostToDevice, stream));
            CHECK_CUDA(cudaStreamSynchronize(stream));
        }
        TokenArgs args{state->token_layers,
                       w(Param::word_embed),
                       w(Param::final_norm),
                       cos_qk,
                       sin_qk,
                       cos_cb,
                       sin_cb,
                       data(matrix(c.tie ? Param::word_embed : Param::lm_head, -1)),
                       tokens,
                       state->cursor,
                       state->best,
                       logits32,
                       state->x,
                       state->proj,
                       state->y,
                       state->mid,
                       state->h,
                       state->partial,
                       int(vocab),
                       state->tag};
        state->tag += uint32_t(c.L);
        void* pointers[] = {const_cast<TokenPlan*>(&plan), &args};
        const void* kernel = plan.P > 64 ? (const void*)token_kernel<16> : (const void*)token_kernel<8>;
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
        CHECK_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(unsigned(plan.blocks)), dim3(kTokenThreads), pointers,
                                               size_t(plan.shared), stream));
        if (profile) profile->mark("token", stream);
        launch("choose", choose_kernel, 1, 256, 0, stream, tokens, state->chosen, state->cursor, state->best, B);
    }
}

// proj -> y for one token of each sequence
template <class A>
void Model<A>::decode_mixer(int64 i, CudaState<A>* state, Position before) {
    const Config& c = config;
    LayerActivations<A>& a = layers[size_t(i)];
    auto& past = state->layers[size_t(i)];
    if (c.is_attention(i)) {
        const int64 row = c.Hkv * c.P();
        const AttentionShape n{B, 1, 0, c.H, c.Hkv, c.P(), padded8(c.attn_width()), row, state->capacity * row};
        attention_step(a.y, state->attention_partial, past.k, past.v, a.proj, cos_qk, sin_qk, n, before, state->splits,
                       stream);
    } else {
        const SsdShape n{B, 1, c.H, c.P(), c.N, c.Q, padded8(c.ssd_width())};
        ssd_step(a.y, past.S, a.proj, w(Param::dt_bias, i), w(Param::A_log, i), cos_cb, sin_cb, c.ssd_decay, n, before,
                 stream);
    }
}

// u1 -> y: one product makes C|B|X|dt_raw or q|k|v side by side; RoPE turns the first two in place.
template <class A>
void Model<A>::mixer_forward(int64 i, CudaState<A>* state, Position before) {
    const Config& c = config;
    LayerActivations<A>& a = layers[size_t(i)];
    typename CudaState<A>::Layer* past = state ? &state->layers[size_t(i)] : nullptr;
    const int64 rows = B * T, H = c.H, N = c.N, P = c.P();
    const bool attention = c.is_attention(i);
    const Matrix& projection = matrix(attention ? Param::q_proj : Param::c_proj, i);
    const int64 ld = projection.ld;
    linear(a.proj, a.u1, projection, rows);
    if (past && T == 1) return decode_mixer(i, state, before);
    if (attention) {
        A *q = a.proj, *k = q + H * P, *v = k + c.Hkv * P;
        rope(q, cos_qk, sin_qk, P, B, T, H + c.Hkv, ld, before, false, stream);  // q and k are neighbours
        AttentionShape n{B, T, before.value + T, H, c.Hkv, P, ld, ld, T * ld};
        if (past) {  // append to the cache and attend to all of it
            n.ld_kv = c.Hkv * P;
            n.seq_kv = state->capacity * n.ld_kv;
            for (const auto& part : {std::make_pair(past->k, k), std::make_pair(past->v, v)})
                launch("append_cache", append_cache_kernel<A>, ceil_div(rows * n.ld_kv, 256), 256, 0, stream,
                       part.first, part.second, rows * n.ld_kv, T, n.ld_kv, ld, state->capacity, before);
            k = past->k;
            v = past->v;
        }
        attention_forward(a.y, a.lse, q, k, v, n, before, stream);
        return;
    }
    A *sc = a.proj, *sb = sc + H * N, *sx = sb + H * N, *dt_raw = sx + H * P;
    rope(sc, cos_cb, sin_cb, N, B, T, 2 * H, ld, before, false, stream);  // C and B are neighbours
    ssd_dt_forward(a.dt, a.dA, dt_raw, w(Param::dt_bias, i), w(Param::A_log, i), c.ssd_decay, rows, H, ld, stream);
    const SsdShape n{B, T, H, P, N, c.Q, ld};
    float* S = past ? past->S : nullptr;
    ssd_forward(a.y, S, past ? nullptr : a.chunk_states, segment_scratch, sc, sb, sx, a.dt, a.dA, S, n, tiles, stream);
}

// Adds scale * d(mean loss) to the gradients: the forward's lines from the last to the first.
template <class A>
void Model<A>::backward(double scale) {
    const Config& c = config;
    const int64 rows = B * T, D = c.D;
    if (!has_targets) fail("backward needs a forward with targets before it, each time");
    has_targets = false;  // logits now hold their gradient: a second backward would be wrong
    buffer(Buffer::gradients);
    const Matrix& head = matrix(c.tie ? Param::word_embed : Param::lm_head, -1);
    for (int64 r0 = 0; r0 < rows; r0 += head_rows) {
        const int64 part = std::min(head_rows, rows - r0);
        if (head_rows < rows) {  // they were overwritten by those of the next part
            linear(logits, u_final + r0 * D, head, part);
            cross_entropy(losses + r0, logits, targets + r0, part, c.V, true, stream);
        }
        linear_backward(du + r0 * D, logits, u_final + r0 * D, head, part, float(scale / double(rows)));
    }
    norm_residual_backward<A>(dx, g(Param::final_norm), nullptr, partial, nullptr, du, x_final, nullptr,
                              w(Param::final_norm), rstd_final, rows, D, stream);
    for (int64 i = c.L - 1; i >= 0; --i) {
        LayerActivations<A>& a = layers[size_t(i)];
        // x_out = res2 * x_mid + dropout(W_down swiglu(W_gate|up rmsnorm(x_mid)));  without dropout dm is dx itself
        if (dropout_on) dropout_backward(dm, dx, dropout(i, 1), rows * D, stream);
        A* d = dropout_on ? dm : dx;
        linear_backward(dh, d, a.h, matrix(Param::down_proj, i), rows);
        swiglu_backward(dgate_up, dh, a.gate_up, rows, c.F, stream);
        linear_backward(du, dgate_up, a.u2, matrix(Param::gate_proj, i), rows);
        norm_residual_backward(dx, g(Param::norm2, i), g(Param::res2, i), partial, dx, du, a.x_mid, w(Param::res2, i),
                               w(Param::norm2, i), a.rstd2, rows, D, stream);
        // x_mid = res1 * x + dropout(W_o mixer(rmsnorm(x)))
        if (dropout_on) dropout_backward(dm, dx, dropout(i, 0), rows * D, stream);
        linear_backward(dy, d, a.y, matrix(c.is_attention(i) ? Param::o_proj : Param::out_proj, i), rows);
        mixer_backward(i);
        norm_residual_backward(dx, g(Param::norm1, i), g(Param::res1, i), partial, dx, du, a.x, w(Param::res1, i),
                               w(Param::norm1, i), a.rstd1, rows, D, stream);
    }
    embedding_backward(g(Param::word_embed), dx, tokens, order, start, distinct, D, stream);
}

// dy -> du, and the gradients of the mixer's parameters
template <class A>
void Model<A>::mixer_backward(int64 i) {
    const Config& c = config;
    LayerActivations<A>& a = layers[size_t(i)];
    const int64 rows = B * T, H = c.H, N = c.N, P = c.P();
    const bool attention = c.is_attention(i);
    const Matrix& projection = matrix(attention ? Param::q_proj : Param::c_proj, i);
    const int64 ld = projection.ld, pad = ld - projection.out;
    A *d = dproj, *proj = a.proj;
    if (attention) {
        const int64 k = H * P, v = k + c.Hkv * P;
        const AttentionShape n{B, T, T, H, c.Hkv, P, ld, ld, T * ld};
        if (pad > 0) CHECK_CUDA(cudaMemsetAsync(d, 0, size_t(rows * ld) * sizeof(A), stream));
        attention_backward(d, d + k, d + v, dyy, dy, proj, proj + k, proj + v, a.y, a.lse, n, stream);
        rope(d, cos_qk, sin_qk, P, B, T, H + c.Hkv, ld, 0, true, stream);
    } else {
        const int64 b = H * N, x = 2 * H * N, dt = x + H * P;
        const SsdShape n{B, T, H, P, N, c.Q, ld};
        ssd_backward<A>(d, d + b, d + x, ddt, ddA, nullptr, segment_scratch, dy, nullptr, proj, proj + b, proj + x,
                        a.dt, a.dA, a.chunk_states, n, tiles, stream);
        ssd_dt_backward(d + dt, g(Param::dt_bias, i), g(Param::A_log, i), partial, ddt, ddA, proj + dt,
                        w(Param::dt_bias, i), w(Param::A_log, i), a.dA, c.ssd_decay, rows, H, ld, pad, stream);
        rope(d, cos_cb, sin_cb, N, B, T, 2 * H, ld, 0, true, stream);
    }
    linear_backward(du, d, a.u1, projection, rows);
}

template <class A>
double Model<A>::gradient_norm() {
    // Blocks of fixed size, so that the order of the sum does not depend on the GPU.
    const int64 block = 1 << 18, blocks = ceil_div(table.count, block);
    if (scratch.size() == 0) scratch.resize(size_t(blocks) * sizeof(double), "a sum");
    launch("gradient_norm", sum_of_squares_kernel, blocks, 256, 0, stream, scratch.at<double>(),
           buffer(Buffer::gradients), table.count, block);
    std::vector<double> sums(static_cast<size_t>(blocks));
    CHECK_CUDA(cudaMemcpyAsync(sums.data(), scratch.at(), scratch.size(), cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    double total = 0;
    for (const double s : sums) total += s;
    return std::sqrt(total);
}

template <class A>
void Model<A>::update(const AdamW& o, double lr, int64 step, double grad_scale) {
    launch("adamw", adamw_kernel<A>, adamw_tile_count, 256, 0, stream, buffer(Buffer::weights), copy.at<A>(),
           buffer(Buffer::exp_avg), buffer(Buffer::exp_avg_sq), buffer(Buffer::gradients), adamw_tiles.at<AdamWTile>(),
           adamw_rates(o, lr, step, grad_scale));
}

template <class A>
std::string Model<A>::find_non_finite() {
    Memory where;
    where.resize(sizeof(unsigned long long), "an index");
    // The index of the first bad number among rows x width, -1 if there is none.
    const auto first_bad = [&](const auto* v, int64 rows, int64 width, int64 ld) -> int64 {
        using T_ = std::remove_cv_t<std::remove_pointer_t<decltype(v)>>;
        CHECK_CUDA(cudaMemsetAsync(where.at(), 0xFF, sizeof(unsigned long long), stream));
        launch("find_non_finite", first_bad_kernel<T_>, 1024, 256, 0, stream, where.at<unsigned long long>(), v, rows,
               width, ld);
        unsigned long long i = 0;
        CHECK_CUDA(cudaMemcpyAsync(&i, where.at(), sizeof i, cudaMemcpyDeviceToHost, stream));
        CHECK_CUDA(cudaStreamSynchronize(stream));
        return i == ~0ull ? -1 : int64(i);
    };
    std::string bad;
    const auto look = [&](const std::string& name, const auto* v, int64 rows, int64 width, int64 ld) {
        if (!bad.empty() || !v) return;
        const int64 i = first_bad(v, rows, width, ld);
        if (i < 0) return;
        typename std::remove_cv_t<std::remove_pointer_t<decltype(v)>> raw;
        CHECK_CUDA(cudaMemcpy(&raw, v + i / width * ld + i % width, sizeof raw, cudaMemcpyDeviceToHost));
        float value;
        if constexpr (sizeof raw == 4) value = raw;
        else value = __bfloat162float(raw);
        bad = format("%s, element %lld, is %s", name.c_str(), (long long)i, std::isnan(value) ? "nan" : "infinite");
    };
    const auto look_parameters = [&](Buffer which, const char* what) {
        if (!bad.empty() || !has(which)) return;
        const int64 i = first_bad(buffer(which), 1, table.count, table.count);
        if (i < 0) return;
        const ParamSpec& s = table.at(i);
        look(format("%s %s", what, s.name.c_str()), buffer(which) + s.offset, 1, s.count, s.count);
    };
    look_parameters(Buffer::weights, "weight");
    if (carved == 1) {
        const int64 rows = B * T, D = config.D;
        for (size_t i = 0; i < layers.size(); ++i) {
            const LayerActivations<A>& a = layers[i];
            const bool attention = config.is_attention(int64(i));
            const Matrix& projection = matrix(attention ? Param::q_proj : Param::c_proj, int64(i));
            const std::string at = format("activation layers.%zu ", i);
            look(at + "input", a.x, rows, D, D);
            look(at + "norm1 output", a.u1, rows, D, D);
            look(at + "mixer projection", a.proj, rows, projection.out, projection.ld);
            if (!attention) {
                const int64 H = config.H, PN = config.P() * config.N;
                look(at + "dt", a.dt, rows, H, H);
                look(at + "chunk state", a.chunk_states, B * H * ssd_chunks(tiles, T), PN, PN);
            }
            look(at + "mixer output", a.y, rows, D, D);
            look(at + "residual", a.x_mid, rows, D, D);
            look(at + "norm2 output", a.u2, rows, D, D);
            look(at + "gate and up", a.gate_up, rows, 2 * config.F, 2 * config.F);
            look(at + "feed-forward hidden", a.h, rows, config.F, config.F);
        }
        look("activation final input", x_final, rows, D, D);
        if (head_rows == rows) look("activation logits", logits, rows, config.V, padded8(config.V));
    }
    look_parameters(Buffer::gradients, "gradient");
    return bad;
}

// ---------------------------------------------------------------------------------------------------------------------
// 13  The engine
// ---------------------------------------------------------------------------------------------------------------------

// Dense bf16 operations per second by the maker's data sheet, for the share of the peak that is shown; 0: not known.
static double data_sheet_peak(const std::string& name) {
    const std::pair<const char*, double> known[] = {{"H100 PCIe", 756e12}, {"H100", 989e12},  {"H200", 989e12},
                                                    {"GH200", 989e12},     {"A100", 312e12},  {"A30", 165e12},
                                                    {"L40S", 362e12},      {"L4", 121e12},    {"4090", 165e12},
                                                    {"3090", 71e12},       {"B200", 2250e12}, {"A10", 125e12}};
    for (const auto& k : known)
        if (name.find(k.first) != std::string::npos) return k.second;
    return 0;
}

template <class A>
class CudaEngine : public Engine {
  public:
    explicit CudaEngine(const Config& c) : Engine(c), model(c) {}
    std::string device() const override {
        int index = 0;
        cudaDeviceProp p;
        CHECK_CUDA(cudaGetDevice(&index));
        CHECK_CUDA(cudaGetDeviceProperties(&p, index));
        return format("%s, %s", p.name, std::is_same<A, float>::value ? "fp32" : "bf16");
    }
    double peak() const override { return std::is_same<A, float>::value ? 0 : data_sheet_peak(device()); }
    std::string plan(int64 B, int64 T) override {
        const double fixed = (16 + (Model<A>::kCopy ? 2 : 0)) * double(table.count),
                     kept = double(model.bytes_for(B, T));
        size_t free = 0, total = 0;
        CHECK_CUDA(cudaMemGetInfo(&free, &total));
        return format("%s for %lld x %lld tokens (weights, gradients and moments %s, activations %s), the GPU has %s",
                      byte_text(fixed + kept).c_str(), (long long)B, (long long)T, byte_text(fixed).c_str(),
                      byte_text(kept).c_str(), byte_text(double(total)).c_str());
    }
    void write(Buffer which, const float* host) override {
        CHECK_CUDA(cudaMemcpyAsync(model.buffer(which), host, bytes(), cudaMemcpyHostToDevice, model.stream));
        if (which == Buffer::weights) model.weights_written();
        CHECK_CUDA(cudaStreamSynchronize(model.stream));
    }
    void read(Buffer which, float* host) const override {
        if (!model.has(which)) std::fill_n(host, table.count, 0.0f);  // not in use yet
        else {
            CHECK_CUDA(cudaMemcpyAsync(host, model.buffer(which), bytes(), cudaMemcpyDeviceToHost, model.stream));
            CHECK_CUDA(cudaStreamSynchronize(model.stream));
        }
    }
    double forward(const int32_t* tokens, const int32_t* targets, int64 B, int64 T, const DropoutKey* key) override {
        return model.forward(tokens, targets, B, T, key, nullptr, nullptr, true);
    }
    void backward(double scale) override { model.backward(scale); }
    void zero_gradients() override {
        CHECK_CUDA(cudaMemsetAsync(model.buffer(Buffer::gradients), 0, bytes(), model.stream));
        if (profile) profile->mark("zero_gradients", model.stream);
    }
    double gradient_norm() override { return model.gradient_norm(); }
    void update(const AdamW& o, double lr, int64 step, double grad_scale) override {
        model.update(o, lr, step, grad_scale);
    }
    std::string find_non_finite() const override { return model.find_non_finite(); }

    std::unique_ptr<State> new_state(int64 B, int64 capacity) const override {
        return std::make_unique<CudaState<A>>(config, B, capacity);
    }
    void step(State& state, const int32_t* tokens, int64 n, float* logits, bool every_token) override {
        model.forward(tokens, nullptr, state.B, n, nullptr, &static_cast<CudaState<A>&>(state), logits, every_token);
    }
    void decode_greedy(State& state, const int32_t* last, int64 count, int64 vocab, int32_t* chosen) override {
        model.decode(&static_cast<CudaState<A>&>(state), last, count, vocab, nullptr, chosen);
    }
    // Through the reference's state on the host, so that there is one file format.
    void save_state(const State& state, const std::string& path) const override {
        const auto& s = static_cast<const CudaState<A>&>(state);
        ref::ModelState<float> host(config, s.B, s.position);
        host.position = s.position;
        const int64 row = config.Hkv * config.P();
        for (size_t i = 0; i < s.layers.size(); ++i) {
            const auto& from = s.layers[i];
            auto& to = host.layers[i];
            if (from.S) read_back(to.S.data(), from.S, int64(to.S.size()));
            else
                for (int64 b = 0; b < s.B; ++b)
                    for (const auto& part : {std::make_pair(to.k.data(), from.k), std::make_pair(to.v.data(), from.v)})
                        read_back(part.first + b * s.position * row, part.second + b * s.capacity * row,
                                  s.position * row);
        }
        ref::save_state(config, host, path);
    }
    std::unique_ptr<State> load_state(const std::string& path, int64 capacity) const override {
        const auto host = ref::load_state(config, path, capacity);
        auto s = std::make_unique<CudaState<A>>(config, host->B, capacity);
        s->position = host->position;
        for (size_t i = 0; i < s->layers.size(); ++i) {
            const auto& from = host->layers[i];
            auto& to = s->layers[i];
            if (to.S) upload(to.S, from.S.data(), int64(from.S.size()));
            else {
                upload(to.k, from.k.data(), int64(from.k.size()));
                upload(to.v, from.v.data(), int64(from.v.size()));
            }
        }
        return s;
    }

  private:
    mutable Model<A> model;  // copying to the host needs the stream
    size_t bytes() const { return size_t(table.count) * sizeof(float); }

    template <class T>
    void upload(T* to, const float* from, int64 n) const {
        if (n == 0) return;
        Memory staging;
        staging.resize(size_t(n) * sizeof(float), "a copy");
        CHECK_CUDA(cudaMemcpyAsync(staging.at(), from, staging.size(), cudaMemcpyHostToDevice, model.stream));
        launch("convert", convert_kernel<T, float>, ceil_div(n, 256), 256, 0, model.stream, to, staging.at<float>(), n);
        CHECK_CUDA(cudaStreamSynchronize(model.stream));
    }
    template <class T>
    void read_back(float* to, const T* from, int64 n) const {
        if (n == 0) return;
        Memory staging;
        staging.resize(size_t(n) * sizeof(float), "a copy");
        launch("convert", convert_kernel<float, T>, ceil_div(n, 256), 256, 0, model.stream, staging.at<float>(), from,
               n);
        CHECK_CUDA(cudaMemcpyAsync(to, staging.at(), staging.size(), cudaMemcpyDeviceToHost, model.stream));
        CHECK_CUDA(cudaStreamSynchronize(model.stream));
    }
};

// ---------------------------------------------------------------------------------------------------------------------
// 14  Twins for tests: the launchers above on host arrays
// ---------------------------------------------------------------------------------------------------------------------
// Each rounds its inputs to A, runs the kernels that the model runs, and widens the outputs to float.

// n numbers of type T on the device; `host` may be null (zero). to() brings them back, if they are wanted.
template <class T>
class Array {
  public:
    Array(const float* host, int64 count) : n(count) {
        memory.resize(size_t(std::max<int64>(1, n)) * sizeof(T), "a test");
        CHECK_CUDA(cudaMemset(memory.at(), 0, memory.size()));
        if (!host || n == 0) return;
        Memory staging;
        staging.resize(size_t(n) * sizeof(float), "a test");
        CHECK_CUDA(cudaMemcpy(staging.at(), host, staging.size(), cudaMemcpyHostToDevice));
        launch("convert", convert_kernel<T, float>, ceil_div(n, 256), 256, 0, nullptr, memory.at<T>(),
               staging.at<float>(), n);
        CHECK_CUDA(cudaDeviceSynchronize());
    }
    operator T*() const { return memory.at<T>(); }
    void to(float* host) const {
        if (!host || n == 0) return;
        Memory staging;
        staging.resize(size_t(n) * sizeof(float), "a test");
        launch("convert", convert_kernel<float, T>, ceil_div(n, 256), 256, 0, nullptr, staging.at<float>(),
               memory.at<T>(), n);
        CHECK_CUDA(cudaMemcpy(host, staging.at(), staging.size(), cudaMemcpyDeviceToHost));
    }

  private:
    Memory memory;
    int64 n;
};
struct Integers {
    Memory memory;
    explicit Integers(const int32_t* host, int64 n) {
        memory.resize(size_t(n) * sizeof(int32_t), "a test");
        CHECK_CUDA(cudaMemcpy(memory.at(), host, memory.size(), cudaMemcpyHostToDevice));
    }
    operator int32_t*() const { return memory.at<int32_t>(); }
};
// Calls body with a float or a bf16: in_precision(p, [&](auto a) { using A = decltype(a); ... });
template <class F>
static void in_precision(Precision p, F body) {
    if (p == Precision::fp32) body(float());
    else body(bf16());
    CHECK_CUDA(cudaDeviceSynchronize());
}

void linear_forward(Precision precision, float* y, const float* x, const float* w, int64 rows, int64 in, int64 out) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Blas blas;
        Array<A> yd(nullptr, rows * out), xd(x, rows * in), wd(w, out * in);
        linear_forward<A, A>(blas, yd, out, xd, wd, rows, in, out, nullptr);
        yd.to(y);
    });
}
void linear_backward(Precision precision, float* dx, float* dw, const float* dy, const float* x, const float* w,
                     int64 rows, int64 in, int64 out) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Blas blas;
        Array<A> dxd(nullptr, rows * in), dyd(dy, rows * out), xd(x, rows * in), wd(w, out * in);
        Array<float> dwd(dw, out * in);
        linear_backward_input<A>(blas, dxd, dyd, out, wd, rows, in, out, 1, nullptr);
        linear_backward_weight<A>(blas, dwd, dyd, out, xd, rows, in, out, 1, nullptr);
        dxd.to(dx);
        dwd.to(dw);
    });
}
void embedding_forward(Precision precision, float* x, const int32_t* tokens, const float* embed, int64 rows, int64 D,
                       int64 V) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> xd(nullptr, rows * D);
        Array<float> ed(embed, V * D);
        const Integers td(tokens, rows);
        embedding_forward<A>(xd, td, ed, rows, D, nullptr);
        xd.to(x);
    });
}
void embedding_backward(Precision precision, float* dembed, const float* dx, const int32_t* tokens, int64 rows, int64 D,
                        int64 V) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        std::vector<int32_t> order, start;
        const int64 distinct = sort_by_token(&order, &start, std::vector<int32_t>(tokens, tokens + rows), V);
        Array<float> ed(dembed, V * D);
        Array<A> dxd(dx, rows * D);
        const Integers td(tokens, rows), od(order.data(), rows), sd(start.data(), distinct + 1);
        embedding_backward<A>(ed, dxd, td, od, sd, distinct, D, nullptr);
        ed.to(dembed);
    });
}
void residual_norm_forward(Precision precision, float* out, float* u, float* rstd, const float* x, const float* m,
                           const float* w_res, const float* w_norm, double eps, const Dropout& dropout, int64 rows,
                           int64 D) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> outd(nullptr, rows * D), ud(nullptr, rows * D), xd(x, rows * D), md(m, rows * D);
        Array<float> rd(nullptr, rows), wr(w_res, w_res ? D : 0), wn(w_norm, D);
        residual_norm_forward<A>(m ? (A*)outd : nullptr, ud, rd, xd, m ? (A*)md : nullptr, wr, wn, eps, dropout, rows,
                                 D, nullptr);
        if (m) outd.to(out);
        ud.to(u);
        rd.to(rstd);
    });
}
void norm_residual_backward(Precision precision, float* dx, float* dw_norm, float* dw_res, const float* dout,
                            const float* du, const float* x, const float* w_res, const float* w_norm, const float* rstd,
                            int64 rows, int64 D) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> dxd(dout, rows * D), dud(du, rows * D), xd(x, rows * D);
        Array<float> dwn(dw_norm, D), dwr(dw_res, D), wr(w_res, w_res ? D : 0), wn(w_norm, D), rd(rstd, rows),
            partial(nullptr, kPartialBlocks * 2 * D);
        norm_residual_backward<A>(dxd, dwn, dout ? (float*)dwr : nullptr, partial, dout ? (A*)dxd : nullptr, dud, xd,
                                  wr, wn, rd, rows, D, nullptr);
        dxd.to(dx);
        dwn.to(dw_norm);
        dwr.to(dw_res);
    });
}
void dropout_backward(Precision precision, float* dm, const float* dout, const Dropout& dropout, int64 n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> dmd(nullptr, n), doutd(dout, n);
        dropout_backward<A>(dmd, doutd, dropout, n, nullptr);
        dmd.to(dm);
    });
}
void rope(Precision precision, float* x, const ref::RopeTable<float>& table, int64 B, int64 T, int64 H, int64 ld,
          int64 pos0, bool inverse) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> xd(x, B * T * ld);
        Array<float> c(table.cos.data(), int64(table.cos.size())), s(table.sin.data(), int64(table.sin.size()));
        rope<A>(xd, c, s, table.d, B, T, H, ld, pos0, inverse, nullptr);
        xd.to(x);
    });
}
// q begins its buffer; k and v lie either in the same buffer (k - q elements on) or, if seq_kv is not T * ld_q, in
// others.
void attention_forward(Precision precision, float* y, float* lse, const float* q, const float* k, const float* v,
                       const AttentionShape& n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        const bool together = n.seq_kv == n.T * n.ld_q;
        Array<A> qd(q, n.B * n.T * n.ld_q), kd(together ? nullptr : k, together ? 0 : n.B * n.seq_kv),
            vd(together ? nullptr : v, together ? 0 : n.B * n.seq_kv), yd(nullptr, n.B * n.T * n.H * n.P);
        Array<float> ld(nullptr, n.B * n.T * n.H);
        attention_forward<A>(yd, ld, qd, together ? qd + (k - q) : (A*)kd, together ? qd + (v - q) : (A*)vd, n,
                             n.S - n.T, nullptr);
        yd.to(y);
        ld.to(lse);
    });
}
void attention_backward(Precision precision, float* dq, float* dk, float* dv, const float* dy, const float* q,
                        const float* k, const float* v, const float* y, const float* lse, const AttentionShape& n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        const int64 rows = n.B * n.T, width = n.H * n.P;
        Array<A> qd(q, rows * n.ld_q), dqd(nullptr, rows * n.ld_q), dyd(dy, rows * width), yd(y, rows * width);
        Array<float> ld(lse, rows * n.H), dyy(nullptr, rows * n.H);
        (void)dk;
        (void)dv;
        attention_backward<A>(dqd, dqd + (k - q), dqd + (v - q), dyy, dyd, qd, qd + (k - q), qd + (v - q), yd, ld, n,
                              nullptr);
        dqd.to(dq);
    });
}
void ssd_dt_forward(float* dt, float* dA, const float* dt_raw, const float* dt_bias, const float* A_log, bool decay,
                    int64 rows, int64 H, int64 ld) {
    Array<float> dtd(nullptr, rows * H), dAd(nullptr, rows * H), raw(dt_raw, rows * ld), bias(dt_bias, H),
        log(A_log, H);
    ssd_dt_forward<float>(dtd, dAd, raw, bias, log, decay, rows, H, ld, nullptr);
    dtd.to(dt);
    dAd.to(dA);
}
void ssd_dt_backward(float* ddt_raw, float* ddt_bias, float* dA_log, const float* ddt, const float* ddA,
                     const float* dt_raw, const float* dt_bias, const float* A_log, const float* dA, bool decay,
                     int64 rows, int64 H, int64 ld) {
    Array<float> out(ddt_raw, rows * ld), dbias(ddt_bias, H), dlog(dA_log, H), partial(nullptr, kPartialBlocks * 2 * H),
        ddtd(ddt, rows * H), ddAd(ddA, rows * H), raw(dt_raw, rows * ld), bias(dt_bias, H), log(A_log, H),
        dAd(dA, rows * H);
    ssd_dt_backward<float>(out, dbias, dlog, partial, ddtd, ddAd, raw, bias, log, dAd, decay, rows, H, ld, 0, nullptr);
    out.to(ddt_raw);
    dbias.to(ddt_bias);
    dlog.to(dA_log);
}
void ssd_step(Precision precision, float* Y, float* S, const float* proj, const float* dt_bias, const float* A_log,
              const ref::RopeTable<float>& table, int64 pos, bool decay, const SsdShape& n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> p(proj, n.B * n.ld), yd(nullptr, n.B * n.H * n.P);
        Array<float> sd(S, n.B * n.H * n.P * n.N), bias(dt_bias, n.H), log(A_log, n.H),
            cos(table.cos.data(), int64(table.cos.size())), sin(table.sin.data(), int64(table.sin.size()));
        ssd_step<A>(yd, sd, p, bias, log, cos, sin, decay, n, pos, nullptr);
        yd.to(Y);
        sd.to(S);
    });
}
void attention_step(Precision precision, float* y, float* k_cache, float* v_cache, const float* proj,
                    const ref::RopeTable<float>& table, int64 past, int64 splits, const AttentionShape& n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> p(proj, n.B * n.ld_q), k(k_cache, n.B * n.seq_kv), v(v_cache, n.B * n.seq_kv),
            yd(nullptr, n.B * n.H * n.P);
        Array<float> cos(table.cos.data(), int64(table.cos.size())), sin(table.sin.data(), int64(table.sin.size())),
            partial(nullptr, n.B * n.H * splits * (n.P + 2));
        attention_step<A>(yd, partial, k, v, p, cos, sin, n, past, splits, nullptr);
        yd.to(y);
        k.to(k_cache);
        v.to(v_cache);
    });
}
void ssd_chunked_forward(Precision precision, float* Y, float* S_T, const float* sc, const float* sb, const float* sx,
                         const float* dt, const float* dA, const float* S_0, const SsdShape& n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        const int64 rows = n.B * n.T, states = n.B * n.H * n.P * n.N;
        Array<A> p(sc, rows * n.ld), yd(nullptr, rows * n.H * n.P);
        Array<float> dtd(dt, rows * n.H), dAd(dA, rows * n.H), s0(S_0, states), st(nullptr, states);
        const SsdTiles tiles = ssd_tiles<A>(n.N, n.P);
        Array<float> scratch(nullptr, ssd_scratch(n, tiles));
        ssd_forward<A>(yd, st, nullptr, scratch, p, p + (sb - sc), p + (sx - sc), dtd, dAd, S_0 ? (float*)s0 : nullptr,
                       n, tiles, nullptr);
        yd.to(Y);
        st.to(S_T);
    });
}
void ssd_chunked_backward(Precision precision, float* dsc, float* ddt, float* ddA, float* dS_0, const float* dY,
                          const float* dS_T, const float* sc, const float* sb, const float* sx, const float* dt,
                          const float* dA, const float* S_0, const SsdShape& n) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        const SsdTiles tiles = ssd_tiles<A>(n.N, n.P);
        const int64 rows = n.B * n.T, states = n.B * n.H * n.P * n.N, b = sb - sc, x = sx - sc;
        Array<A> p(sc, rows * n.ld), d(nullptr, rows * n.ld), yd(nullptr, rows * n.H * n.P), dYd(dY, rows * n.H * n.P);
        Array<float> dtd(dt, rows * n.H), dAd(dA, rows * n.H), s0(S_0, states), ds0(nullptr, states), dst(dS_T, states),
            kept(nullptr, states * ssd_chunks(tiles, n.T)), ddtd(nullptr, rows * n.H), ddAd(nullptr, rows * n.H),
            scratch(nullptr, ssd_scratch(n, tiles));
        ssd_forward<A>(yd, nullptr, kept, scratch, p, p + b, p + x, dtd, dAd, S_0 ? (float*)s0 : nullptr, n, tiles,
                       nullptr);
        ssd_backward<A>(d, d + b, d + x, ddtd, ddAd, ds0, scratch, dYd, dS_T ? (float*)dst : nullptr, p, p + b, p + x,
                        dtd, dAd, kept, n, tiles, nullptr);
        d.to(dsc);
        ddtd.to(ddt);
        ddAd.to(ddA);
        ds0.to(dS_0);
    });
}
void swiglu_forward(Precision precision, float* h, const float* gate_up, int64 rows, int64 F) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> hd(nullptr, rows * F), g(gate_up, rows * 2 * F);
        swiglu_forward<A>(hd, g, rows, F, nullptr);
        hd.to(h);
    });
}
void swiglu_backward(Precision precision, float* dgate_up, const float* dh, const float* gate_up, int64 rows, int64 F) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> d(nullptr, rows * 2 * F), dhd(dh, rows * F), g(gate_up, rows * 2 * F);
        swiglu_backward<A>(d, dhd, g, rows, F, nullptr);
        d.to(dgate_up);
    });
}
// Rows of logits are padded8(V) apart; they become the gradient of the sum of the losses.
void cross_entropy(Precision precision, float* losses, float* logits, const int32_t* targets, int64 rows, int64 V) {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        Array<A> z(logits, rows * padded8(V));
        Array<float> l(nullptr, rows);
        const Integers t(targets, rows);
        cross_entropy<A>(l, z, t, rows, V, true, nullptr);
        z.to(logits);
        l.to(losses);
    });
}

// "" if there is a GPU that this program can use, else why not.
std::string problem() {
    int count = 0, driver = 0;
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaErrorInsufficientDriver) {
        cudaGetLastError();
        cudaDriverGetVersion(&driver);
        if (driver == 0) return "no NVIDIA driver is installed";
        return format("the NVIDIA driver is too old: it supports CUDA %d.%d, this program was built with %d.%d",
                      driver / 1000, driver % 100 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 100 / 10);
    }
    if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0)) {
        cudaGetLastError();
        return "no NVIDIA GPU was found";
    }
    if (e != cudaSuccess) {
        cudaGetLastError();
        return std::string("the GPU cannot be used: ") + cudaGetErrorString(e);
    }
    int device = 0, major = 0, minor = 0;
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
        cudaGetLastError();
        return "the GPU cannot be asked what it is";
    }
    if (major < 8) return format("the GPU is too old: compute capability %d.%d, at least 8.0 is needed", major, minor);
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, add_partials_kernel) != cudaSuccess) {
        cudaGetLastError();
        return format("this program was built for other GPUs: rebuild with make CUDA_ARCH=sm_%d%d", major, minor);
    }
    return "";
}

}  // namespace cuda

std::unique_ptr<Engine> make_cuda_engine(const Config& c, Precision precision) {
    const std::string problem = cuda::problem();
    if (!problem.empty()) fail("--device cuda: %s", problem.c_str());
    if (precision == Precision::fp32) return std::make_unique<cuda::CudaEngine<float>>(c);
    return std::make_unique<cuda::CudaEngine<cuda::bf16>>(c);
}

// ---------------------------------------------------------------------------------------------------------------------
// 15  Benchmark
// ---------------------------------------------------------------------------------------------------------------------

namespace cuda {

static double seconds_now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static double median(std::vector<double> v) {
    std::sort(v.begin(), v.end());
    return v[v.size() / 2];
}

// One more step with an event after each launch: how long each kind of launch took in all.
static void print_profile(const std::function<void()>& step) {
    Profile marks;
    profile = &marks;
    marks.mark("", nullptr);
    step();
    profile = nullptr;
    CHECK_CUDA(cudaDeviceSynchronize());
    struct Line {
        int64 launches = 0;
        double ms = 0;
    };
    std::map<std::string, Line> lines;
    double total = 0;
    for (size_t i = 1; i < marks.marks.size(); ++i) {
        float ms = 0;
        CHECK_CUDA(cudaEventElapsedTime(&ms, marks.marks[i - 1].second, marks.marks[i].second));
        Line& l = lines[marks.marks[i].first];
        ++l.launches;
        l.ms += double(ms);
        total += double(ms);
    }
    std::vector<std::pair<double, std::string>> order;
    for (const auto& l : lines) order.emplace_back(-l.second.ms, l.first);
    std::sort(order.begin(), order.end());
    printf("\n%-28s %8s %10s %7s\n", "launch", "times", "ms", "share");
    for (const auto& o : order)
        printf("%-28s %8lld %10.3f %6.1f%%\n", o.second.c_str(), (long long)lines[o.second].launches,
               lines[o.second].ms, 100 * lines[o.second].ms / total);
    printf("%-28s %8s %10.3f\n", "all", "", total);
}

// The fewest bytes that a decode step moves: every matrix once, S read and written, K and V read. `element`: bytes of
// one number of weights, K and V.
static double decode_bytes(const Config& c, int64 B, int64 context, int64 element) {
    double bytes = double(c.V * c.D * element);
    for (int64 i = 0; i < c.L; ++i) {
        const bool attention = c.is_attention(i);
        bytes += double(((attention ? c.attn_width() : c.ssd_width()) + c.D + 3 * c.F) * c.D * element);
        bytes += double(B) * double(attention ? 2 * context * c.Hkv * c.P() * element : 8 * c.H * c.P() * c.N);
    }
    return bytes;
}

int bench_command(int argc, char** argv) {
    std::string name = "5m", precision = "bf16";
    int64 B = 4, length = 0, decode_tokens = 128, repeats = 10, decode_batch = 1, prompt = 64, attn_period = -1,
          training = 1;
    Options o(
        "transxssm",
        "usage: transxssm bench [options]\n\nTimes training, evaluation and decoding on the GPU; prints medians, and "
        "where a step's time goes.");
    o.add("preset", &name, "model");
    o.add("precision", &precision, "bf16 or fp32");
    o.add("batch", &B, "sequences of a train step", 1, 1 << 20);
    o.add("seq-len", &length, "tokens of a sequence; 0: the preset's", 0, 1 << 24);
    o.add("repeats", &repeats, "timed steps", 1, 1000);
    o.add("prompt", &prompt, "tokens before decoding", 1, 1 << 24);
    o.add("tokens", &decode_tokens, "tokens to decode; 0: do not", 0, 1 << 24);
    o.add("decode-batch", &decode_batch, "sequences to decode at once", 1, 1 << 20);
    o.add("attn-period", &attn_period, "one layer in so many is attention, 0 none, -1 as the preset", -1, 1 << 20);
    o.add("train", &training, "0: leave out training and evaluation", 0, 1);
    if (!o.parse(argc, argv, 1)) return 0;
    if (precision != "bf16" && precision != "fp32")
        usage_error("--precision: '%s' is not bf16 or fp32", precision.c_str());
    Config c = preset(name);
    if (attn_period >= 0) c.attn_period = attn_period;
    if (length == 0) length = c.T;
    const auto engine = make_cuda_engine(c, precision == "fp32" ? Precision::fp32 : Precision::bf16);
    engine->write(Buffer::weights, initial_weights(c, 1).data());
    printf("model       %s, %s parameters, %s\n", name.c_str(), with_commas(engine->table.count).c_str(),
           engine->device().c_str());
    printf("memory      %s\n\n", engine->plan(B, length).c_str());
    fflush(stdout);
    const Philox stream(1, "bench");
    const int64 rows = B * length;
    std::vector<int32_t> tokens(size_t(std::max<int64>(rows, decode_batch * std::min<int64>(prompt, 65536)) + 1));
    for (size_t r = 0; r < tokens.size(); ++r) tokens[r] = int32_t(stream.at(r).word[0] % uint32_t(c.V));
    int64 steps = 0;
    const auto train_step = [&] {
        engine->zero_gradients();
        engine->forward(tokens.data(), tokens.data() + 1, B, length);
        engine->backward(1);
        const double norm = engine->gradient_norm();
        engine->update(AdamW(), 1e-4, ++steps, norm > 1 ? 1 / norm : 1);
    };
    const auto time = [&](const std::function<void()>& f) {
        std::vector<double> times;
        for (int64 i = -2; i < repeats; ++i) {
            CHECK_CUDA(cudaDeviceSynchronize());
            const double start = seconds_now();
            f();
            CHECK_CUDA(cudaDeviceSynchronize());
            if (i >= 0) times.push_back(seconds_now() - start);
        }
        return median(times);
    };
    if (training) {
        const double train = time(train_step);
        const double eval = time([&] { engine->forward(tokens.data(), tokens.data() + 1, B, length); });
        printf("train step  B %lld x T %lld  %9.2f ms  %9.0f tokens/s", (long long)B, (long long)length, 1e3 * train,
               double(rows) / train);
        if (engine->peak() > 0)
            printf("  (%.1f%% of the data sheet's peak)",
                   100 * flops_per_token(c, length) * double(rows) / train / engine->peak());
        printf("\nevaluation  B %lld x T %lld  %9.2f ms  %9.0f tokens/s\n", (long long)B, (long long)length, 1e3 * eval,
               double(rows) / eval);
        fflush(stdout);
        print_profile(train_step);
    }
    if (decode_tokens > 0) {
        std::vector<float> logits(size_t(decode_batch * c.V));
        std::vector<int32_t> next(size_t(decode_batch), 1), chosen(size_t(decode_batch * decode_tokens));
        const auto state = engine->new_state(decode_batch, prompt + 2 * decode_tokens + 2);
        const auto prefill = [&](State& s) {  // in pieces of at most 64 Ki tokens
            const int64 piece = std::max<int64>(1, std::min(prompt, 65536 / decode_batch));
            for (int64 at = 0; at < prompt; at += piece)
                engine->step(s, tokens.data(), std::min(piece, prompt - at), logits.data());
        };
        prefill(*engine->new_state(decode_batch, prompt));
        const double before = seconds_now();
        prefill(*state);
        const double prefilled = seconds_now() - before;
        printf("\nprefill     %lld x %lld tokens  %9.2f ms  %9.0f tokens/s\n", (long long)decode_batch,
               (long long)prompt, 1e3 * prefilled, double(decode_batch * prompt) / prefilled);
        // Greedily, all at once: the host looks at the tokens every now and then. Then one by one, with the logits.
        engine->decode_greedy(*state, next.data(), 1, c.V, chosen.data());
        double start = seconds_now();
        engine->decode_greedy(*state, next.data(), decode_tokens, c.V, chosen.data());
        const double t = (seconds_now() - start) / double(decode_tokens);
        const double bytes = decode_bytes(c, decode_batch, prompt + decode_tokens / 2, precision == "fp32" ? 4 : 2);
        printf(
            "decode      %lld sequences after %lld tokens, greedy  %8.3f ms  %8.0f tokens/s  %.3f GB a step, %.2f TB/s\n",
            (long long)decode_batch, (long long)prompt, 1e3 * t, double(decode_batch) / t, bytes / 1e9,
            bytes / t / 1e12);
        std::vector<double> times;
        for (int64 i = 0; i < decode_tokens; ++i) {
            start = seconds_now();
            engine->step(*state, next.data(), 1, logits.data());
            times.push_back(seconds_now() - start);
        }
        printf("decode      the same with the logits on the host   %8.3f ms  %8.0f tokens/s\n", 1e3 * median(times),
               double(decode_batch) / median(times));
        fflush(stdout);
        print_profile([&] { engine->decode_greedy(*state, next.data(), 1, c.V, chosen.data()); });
    }
    return 0;
}

}  // namespace cuda

// ---------------------------------------------------------------------------------------------------------------------
// 16  main
// ---------------------------------------------------------------------------------------------------------------------

#else
int main(int argc, char** argv) {
    return run_main("transxssm", [&] {
        const std::string command = argc > 1 ? argv[1] : "--help";
        if (command == "bench") return cuda::bench_command(argc - 1, argv + 1);
        if (command == "--help" || command == "-h") {
            printf(
                "transxssm: TransXSSM on an NVIDIA GPU.\n\n%s"
                "    bench                 time training, evaluation and decoding on this GPU\n\n"
                "transxssm COMMAND --help lists a command's options.\n",
                model_command_help());
            return 0;
        }
        return model_command("transxssm", argc - 1, argv + 1,
                             [](const Config& c) { return make_cuda_engine(c, Precision::bf16); }, {"bench"});
    });
}
#endif
