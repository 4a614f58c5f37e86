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
//   7  SSD                a block sweeps chunks of (sequence, head) pairs, the state in registers
//   8  residual           learned skip + dropout + the norm that follows, in one pass over memory
//   9  SwiGLU             alone, or on Hopper as the last step of the products beside it
//  10  cross-entropy      loss and gradient in one pass
//  11  AdamW              all parameters in one launch
//  11b decoding           one further token of each sequence
//  12  the model          one forward for training, prefill and decode; one backward
//  13  the engine         behind the interface of transxssm.h
//  14  twins for tests    the launchers on host arrays
//  15  benchmark
//  16  a candidate for the oracle   what the kernels make, beside the numbers of ref_cpu.cpp
//  17  main
//
// NUMBERS. A, the type of activations, is __nv_bfloat16 (default) or float (for comparisons; no TF32 anywhere).
// Whatever A is: sums, norms, softmax, dt, dA, cs, SSD states, losses, master weights, gradients and moments are
// fp32.
//
// SAME BITS EVERY RUN. No floating-point atomics. A sum that many blocks share is written as one partial sum per
// block, and one more kernel adds those up in order. The order depends on shapes, and where chunks are dealt out to all
// multiprocessors (section 7) on their number.
//
// SIZES. Offsets are 64-bit. Matrix products are several times slower where rows do not begin at multiples of 8
// elements. The widths that often are no such multiple are padded in memory, the mixer's projection to a multiple of 32
// and the logits to one of 8: their rows are ld elements apart and end in zeros.
#include <cublasLt.h>
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <deque>
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
static int64 padded32(int64 n) { return round_up(n, 32); }

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

static int device_attribute(cudaDeviceAttr which) {
    int device = 0, value = 0;
    CHECK_CUDA(cudaGetDevice(&device));
    CHECK_CUDA(cudaDeviceGetAttribute(&value, which, device));
    return value;
}
static int multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }
// Shared memory that a block may ask for, in bytes.
static int64 shared_memory_per_block() { return device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

template <class T>
struct Same {
    using type = T;
};
// kernel<<<blocks, threads, shared, stream>>>(arguments), checked. Grids have one dimension, which may count to 2^31
// - 1.
// together: all blocks run at once, so that they may wait for each other (refused if they do not fit).
template <class... P>
static void launch(bool together, const char* name, void (*kernel)(P...), int64 blocks, int threads, size_t shared,
                   cudaStream_t stream, typename Same<P>::type... arguments) {
    if (blocks < 1 || blocks > INT32_MAX) fail("GPU: %s: %lld blocks: expected 1 to 2^31-1", name, (long long)blocks);
    if (shared > 47 * 1024) {  // 48 KB are allowed without asking, the kernel's own arrays included
        const cudaError_t e =
            cudaFuncSetAttribute((const void*)kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (e != cudaSuccess) {
            cudaGetLastError();
            fail("GPU: %s: needs %zu bytes of shared memory, more than this GPU has per block", name, shared);
        }
    }
    cudaLaunchAttribute cooperative;
    cooperative.id = cudaLaunchAttributeCooperative;
    cooperative.val.cooperative = 1;
    cudaLaunchConfig_t how = {};
    how.gridDim = dim3(unsigned(blocks));
    how.blockDim = dim3(unsigned(threads));
    how.dynamicSmemBytes = shared;
    how.stream = stream;
    how.attrs = &cooperative;
    how.numAttrs = together;
    check(cudaLaunchKernelEx(&how, kernel, arguments...), name);
    if (profile) profile->mark(name, stream);
}
template <class... P>
static void launch(const char* name, void (*kernel)(P...), int64 blocks, int threads, size_t shared,
                   cudaStream_t stream, typename Same<P>::type... arguments) {
    launch<P...>(false, name, kernel, blocks, threads, shared, stream, arguments...);
}

// Calls f with the one of `numbers` that n equals, as a type: a number at compile time.
template <int... numbers, class F>
static void with_number(int64 n, F f) {
    if (!((n == numbers && (f(std::integral_constant<int, numbers>()), true)) || ...))
        fail("GPU: there is no kernel for %lld", (long long)n);
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
// and it is enough to swap A and B and to pass N before M. An operand that we want transposed is one for them too.
//
// THE ALGORITHM is chosen by rule, not by a race against the clock, so that it is the same in every run. The library's
// heuristic lists up to eight for a product, with its first choice first. Measured inside whole training steps, another
// one of the list is often faster, and the tile of its output tells which: see preferred_tiles. Reductions in place are
// excluded, all others add up in a fixed order.

// From so many rows on products take the algorithms of preferred_tiles, and the two that SwiGLU follows the kernel of
// section 9. Both were timed for training steps; fewer rows, as in decoding, were not.
static constexpr int64 kManyTokens = 8192;

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
            fail("cuBLASLt: %s, %s: %s", name, product_text(M, N, K).c_str(), cublasLtGetStatusString(s));
        if (profile) profile->mark(name, stream);
    }

    // What was chosen for each product so far, for the log of a run.
    std::vector<std::string> choices() const {
        std::vector<std::string> list = {format("cuBLASLt %zu", cublasLtGetVersion())};
        for (const auto& p : plans) {
            const auto& [type_c, type_ab, la, lb, M, N, K, lda, ldb, ldc, accumulate, align_a, align_b, align_c] =
                p.first;
            const auto text = [](int type) { return type == CUDA_R_32F ? "fp32" : "bf16"; };
            const auto matrix = [](Layout l, const Shape& shape) {
                return to_text(shape) + (l == Layout::transposed ? "'" : "");
            };
            list.push_back(format("%s %s %s %s %s %s: algorithm %d, tile %d, split %d", text(type_c),
                                  to_text({M, N}).c_str(), accumulate ? "+=" : "=", text(type_ab),
                                  matrix(la, {M, K}).c_str(), matrix(lb, {K, N}).c_str(),
                                  attribute(p.second.algorithm, CUBLASLT_ALGO_CONFIG_ID),
                                  attribute(p.second.algorithm, CUBLASLT_ALGO_CONFIG_TILE_ID),
                                  attribute(p.second.algorithm, CUBLASLT_ALGO_CONFIG_SPLITK_NUM)));
        }
        return list;
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
    static std::string product_text(int64 M, int64 N, int64 K) {
        return to_text({M, N}) + " = " + to_text({M, K}) + " " + to_text({K, N});
    }
    static int alignment(const void* p) {  // the largest power of two that divides the address, up to 256
        int n = 256;
        while (uintptr_t(p) % uintptr_t(n)) n /= 2;
        return n;
    }
    static void check(cublasStatus_t s, const char* what) {
        if (s != CUBLAS_STATUS_SUCCESS) fail("cuBLASLt: %s: %s", what, cublasLtGetStatusString(s));
    }
    static int attribute(const cublasLtMatmulAlgo_t& algorithm, cublasLtMatmulAlgoConfigAttributes_t which) {
        int value = 0;
        size_t written = 0;
        check(cublasLtMatmulAlgoConfigGetAttribute(&algorithm, which, &value, sizeof value, &written), "attribute");
        return value;
    }
    // The tiles to prefer over the heuristic's first choice, the best first, if they are on its list and the inner
    // dimension is not split. Found by timing steps of `320m` on an H200 with each algorithm of the list
    // (docs/cuda.md): products of activations are 1 to 18% faster, the gradient of [C|B|X|dt] is 6%. Gradients of the
    // wider matrices of `1.3b` are better off with the first choice.
    static std::vector<int> preferred_tiles(int type_c, int64 M, int64 N, int64 K) {
#if CUDART_VERSION >= 12090  // older headers may not have the name
        constexpr int wide = CUBLASLT_MATMUL_TILE_176x128;
#else
        constexpr int wide = CUBLASLT_MATMUL_TILE_128x160;
#endif
        if (type_c == CUDA_R_16BF && M >= kManyTokens) return {wide, CUBLASLT_MATMUL_TILE_128x160};
        if (type_c == CUDA_R_32F && K >= kManyTokens && N <= 1024) return {CUBLASLT_MATMUL_TILE_128x192};
        return {};
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
        cublasLtMatmulHeuristicResult_t found[8];
        int count = 0;
        const cublasStatus_t s =
            cublasLtMatmulAlgoGetHeuristic(handle, p.op, p.b, p.a, p.c, p.c, preference, 8, found, &count);
        cublasLtMatmulPreferenceDestroy(preference);
        if (s != CUBLAS_STATUS_SUCCESS || count < 1)
            fail("cuBLASLt: no algorithm for %s, row strides %lld, %lld, %lld: %s", product_text(M, N, K).c_str(),
                 (long long)ldc, (long long)lda, (long long)ldb, cublasLtGetStatusString(s));
        p.algorithm = found[0].algo;
        for (const int tile : preferred_tiles(type_c, M, N, K))
            for (int i = 0; i < count; ++i)
                if (attribute(found[i].algo, CUBLASLT_ALGO_CONFIG_TILE_ID) == tile &&
                    attribute(found[i].algo, CUBLASLT_ALGO_CONFIG_SPLITK_NUM) <= 1) {
                    p.algorithm = found[i].algo;
                    return p;
                }
        return p;
    }
};

// The three products of a linear layer. Rows of y and dy are ldy apart; x, dx, w and dw are dense.
// y (rows,out) = x (rows,in) W^T, or +=
template <class Y, class A>
static void linear_forward(Blas& blas, Y* y, int64 ldy, const A* x, const A* w, int64 rows, int64 in, int64 out,
                           cudaStream_t stream, bool accumulate = false) {
    blas.matmul("matmul y = x W'", y, ldy, x, in, Layout::plain, w, in, Layout::transposed, rows, out, in, 1,
                accumulate, stream);
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

__device__ inline int lane_id() { return int(threadIdx.x % 32); }
__device__ inline int acc_row() { return int(threadIdx.x % 32 / 4); }  // and + 8
__device__ inline int acc_col() { return int(threadIdx.x % 4 * 2); }   // and + 1

__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Four 8 x 8 matrices of bf16 from shared memory: lane i gives the address of row i%8 of matrix i/8.
template <bool transpose>
__device__ inline void load_matrices(uint32_t (&r)[4], const bf16* row) {
    const uint32_t address = shared_address(row);
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

// Two numbers in bf16, one word.
__device__ inline uint32_t pack(float a, float b) {
    const __nv_bfloat162 two = __floats2bfloat162_rn(a, b);
    uint32_t bits;
    memcpy(&bits, &two, 4);
    return bits;
}
__device__ inline float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
__device__ inline float high_half(uint32_t pair) { return __uint_as_float(pair & 0xFFFF0000u); }

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
// Elements of shared memory that a warp's patch takes: two operands of 16 x 16.
template <class A>
constexpr int kPatch = std::is_same<A, float>::value ? 2 * 16 * (16 + kTilePad<float>) : 0;

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

// 16 bytes from memory to an address in shared memory, in the background until copies_done(). If they are not `inside`,
// none is read, and zeros are written.
__device__ inline void copy16(uint32_t to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
__device__ inline void copy16(uint32_t to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(inside ? 16 : 0) : "memory");
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
            copy16(shared_address(tile + r * tile_ld + c), source, inside);
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
// Copies that run in the background, announced by a barrier in shared memory; compute capability 9.0.
__device__ inline void init_barrier(uint32_t barrier, int arrivals) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ inline void arrive(uint32_t barrier) {
    asm volatile("{.reg .b64 s; mbarrier.arrive.shared.b64 s, [%0];}" ::"r"(barrier) : "memory");
}
__device__ inline void expect_bytes(uint64_t* barrier, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#define BARRIER_WAIT "test_wait"
#else
#define BARRIER_WAIT "try_wait"
#endif
__device__ inline void await(uint32_t barrier, unsigned phase) {
    asm volatile(
        "{.reg .pred p;\n"
        "again: mbarrier." BARRIER_WAIT
        ".parity.shared.b64 p, [%0], %1;\n"
        "@!p bra again;}" ::"r"(barrier),
        "r"(phase & 1)
        : "memory");
}
__device__ inline void await(uint64_t* barrier, unsigned phase) { await(shared_address(barrier), phase); }

// ---------------------------------------------------------------------------------------------------------------------
// 3  Embedding: x_r = E[token_r]
// ---------------------------------------------------------------------------------------------------------------------

template <class A, int W>
__global__ void embedding_forward_kernel(A* x, const int32_t* tokens, const float* embed, int64 n, int64 D) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    float f[W];
    load<W>(f, embed + int64(tokens[i / D]) * D + i % D);
    store<W>(x + i, f);
}
template <class A>
static void embedding_forward(A* x, const int32_t* tokens, const float* embed, int64 rows, int64 D,
                              cudaStream_t stream) {
    const int W = D % 4 == 0 ? 4 : 1;
    launch("embedding_forward", W == 4 ? embedding_forward_kernel<A, 4> : embedding_forward_kernel<A, 1>,
           ceil_div(rows * D, 256 * W), 256, 0, stream, x, tokens, embed, rows * D, D);
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
static int64 sort_by_token(std::vector<int32_t>* order, std::vector<int32_t>* start, const int32_t* tokens, int64 rows,
                           int64 V) {
    std::vector<int32_t> first(size_t(V + 1), 0);
    for (int64 r = 0; r < rows; ++r) ++first[size_t(tokens[r]) + 1];
    start->clear();
    for (int64 v = 0; v < V; ++v) {
        if (first[size_t(v) + 1] > 0) start->push_back(first[size_t(v)]);
        first[size_t(v) + 1] += first[size_t(v)];
    }
    start->push_back(int32_t(rows));
    order->resize(size_t(rows));
    for (int64 r = 0; r < rows; ++r) (*order)[size_t(first[size_t(tokens[r])]++)] = int32_t(r);
    return int64(start->size()) - 1;
}

// ---------------------------------------------------------------------------------------------------------------------
// 4  RMSNorm: rstd = 1 / sqrt(mean(x^2) + eps);  u = x * rstd * w
// ---------------------------------------------------------------------------------------------------------------------
// The kernel of section 8 does it, together with the residual that comes before; alone it has no m. Decoding has it inside
// other kernels (section 11b), but for the final norm.

// ---------------------------------------------------------------------------------------------------------------------
// 5  RoPE: the pair (x_j, x_{j+d/2}) turns by the angle pos * theta^(-2j/d), j < d/2
// ---------------------------------------------------------------------------------------------------------------------
// In place. cos and sin (positions, d/2) come from the host, made in double. One thread turns W pairs.

template <class A, int W>
__global__ void rope_kernel(A* x, const float* cos, const float* sin, int64 n, int64 T, int64 H, int64 half, int64 ld,
                            int64 pos0, float sign) {
    const int64 i = (int64(blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    const int64 j = i % half, head = i / half % H, row = i / half / H, pos = pos0 + row % T;
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
static void rope(A* x, const float* cos, const float* sin, int64 d, int64 B, int64 T, int64 H, int64 ld, int64 pos0,
                 bool inverse, cudaStream_t stream) {
    const int64 half = d / 2, n = B * T * H * half;
    const bool vectors = half % 8 == 0 && ld % 8 == 0 && uintptr_t(x) % 32 == 0;
    launch("rope", vectors ? rope_kernel<A, 8> : rope_kernel<A, 1>, ceil_div(n, vectors ? 2048 : 256), 256, 0, stream,
           x, cos, sin, n, T, H, half, ld, pos0, inverse ? -1.0f : 1.0f);
}

// ---------------------------------------------------------------------------------------------------------------------
// 6  Attention: y_t = sum_{s<=t} p_ts v_s,  p_t = softmax_s(q_t . k_s / sqrt(P))
// ---------------------------------------------------------------------------------------------------------------------
// Scores exist on chip only. A block owns rows of its result, queries or keys, and walks over the rows of the other side
// that these see, a tile per step, which arrives during the steps before. Steps in the future of all own rows are left out.
// kP is P padded to 64 or 128.
//
// Compute-bound: forward 4 P T^2/2 operations per head, backward 14 P T^2/2, against 4 P T and 8 P T numbers moved.
// Beside the products stand the exponentials (T^2/2 per head forward, T^2 backward; a multiprocessor makes 16 per cycle)
// and the reads of shared memory (128 bytes per cycle): a warp that owns 16 rows reads 1 byte for 16 operations, as much
// as mma.sync can use up; one that owns 32 rows half of that.

// How a kernel is cut up. team: warps that multiply together, 1 (float, mma.sync) or 4 (wgmma, below). A warp owns 16 M
// rows. step: rows of the other side at a time; stages: buffers for them. keep: the block's own operands stay in registers,
// else each product reads them from shared memory. blocks: how many shall share a multiprocessor.
template <int team_, int M_, int warps_, int step_, int stages_, bool keep_, int blocks_>
struct Tiling {
    static constexpr int team = team_, M = M_, warps = warps_, step = step_, stages = stages_, blocks = blocks_;
    static constexpr bool keep = keep_;
    static constexpr int threads = 32 * warps, own = 16 * M * warps, team_rows = 16 * M * team;
    // The block's rows belong to one team after the other, a team's rows to its warps in turn, 16 at a time.
    // Lane 0's number, passed to all: the compiler then knows that it is the same for a warp.
    __device__ static int team_row() { return __shfl_sync(~0u, int(threadIdx.x) / (32 * team), 0) * team_rows; }
    __device__ static int my_row(int m) { return (m * team + int(threadIdx.x) / 32 % team) * 16; }  // within the team's
};

// ---- 6a  Tiles and products ------------------------------------------------------------------------------------------
// Section 2's products again, of M x 16 rows per warp, and in a third form. Hopper's instruction wgmma multiplies 64
// rows, 16 per warp of a team of four, by a matrix that it reads from shared memory by itself: once for all 64 rows, at
// twice the rate of mma.sync. Accumulators and operands in registers are laid out as for mma.sync, so that the kernels
// below are written once. What differs:
//   - the layout of a tile: panels of 64 columns, rows of 128 bytes, where the eight 16-byte pieces of row r change
//     places, c -> c ^ r % 8 (the "128-byte swizzle"): eight rows of one column lie in different banks. The copy engine
//     makes it so: one thread asks for a whole tile, the others have no part in it
//   - products go on in the background. products_wait<n>() returns when all but the n youngest are done; until then
//     nobody may touch their accumulators, nor overwrite the tiles they read
// Code for sm_90a has all this. In any other these functions are empty, and has_wgmma() keeps them from being called.
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WGMMA(...)
#else
#define WGMMA(...) __VA_ARGS__
#endif

// Where element (r,c) of a tile of kRows x kP lies.
template <class A, int kRows, int kP, int team>
struct Tile {
    static constexpr int ld = kP + kTilePad<A>, size = kRows * ld;
    __device__ static int at(int r, int c) { return r * ld + c; }
};
template <int kRows, int kP>
struct Tile<bf16, kRows, kP, 4> {
    static constexpr int ld = 64, panel = kRows * ld, size = kP / 64 * panel;
    // Of the operand at p: the address in units of 16 bytes, 1024 bytes from 8 rows to the next 8, the swizzle. What
    // begins e elements later (a multiple of 8) has start(p) + e / 8.
    __device__ static uint32_t start(const bf16* p) { return shared_address(p) / 16 | 1 << 16; }
    __device__ static uint64_t describe(uint32_t start) { return uint64_t(1024 / 16 | 1 << 30) << 32 | start; }
};

// d (64,N) = a (64,16) b (16,N), or += if `add`. b lies in its tile as it is (plain) or as its transpose. a: fragments in
// registers, or the description of rows in a tile; section 9 has wider b: fewer reads of a.
#define D4(t) "+f"(d[t][0]), "+f"(d[t][1]), "+f"(d[t][2]), "+f"(d[t][3])
#define D32(t) D4(t), D4(t + 1), D4(t + 2), D4(t + 3), D4(t + 4), D4(t + 5), D4(t + 6), D4(t + 7)
#define R10(t) "%" #t "0,%" #t "1,%" #t "2,%" #t "3,%" #t "4,%" #t "5,%" #t "6,%" #t "7,%" #t "8,%" #t "9,"
#define R30 R10() R10(1) R10(2)
#define R60 R30 R10(3) R10(4) R10(5)
#define WGMMA_N(N) "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {"
template <Layout lb>
__device__ inline void wgmma(float (*d)[4], const uint32_t (&a)[4], uint64_t b, bool add) {
    WGMMA(asm volatile("{.reg .pred p; setp.ne.b32 p, %37, 0; " WGMMA_N(64) R30
                       "%30,%31}, {%32,%33,%34,%35}, %36, p, 1, 1, %38;}"
                       : D32(0)
                       : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(add)), "n"(lb == Layout::plain)));
}
template <Layout lb, int N = 64>
__device__ inline void wgmma(float (*d)[4], uint64_t a, uint64_t b, bool add) {
    if constexpr (N == 64)
        WGMMA(asm volatile("{.reg .pred p; setp.ne.b32 p, %34, 0; " WGMMA_N(64) R30
                           "%30,%31}, %32, %33, p, 1, 1, 0, %35;}"
                           : D32(0)
                           : "l"(a), "l"(b), "r"(int(add)), "n"(lb == Layout::plain)));
    if constexpr (N == 128)
        WGMMA(asm volatile("{.reg .pred p; setp.ne.b32 p, %66, 0; " WGMMA_N(128) R60
                           "%60,%61,%62,%63}, %64, %65, p, 1, 1, 0, %67;}"
                           : D32(0), D32(8)
                           : "l"(a), "l"(b), "r"(int(add)), "n"(lb == Layout::plain)));
    if constexpr (N == 192)
        WGMMA(asm volatile("{.reg .pred p; setp.ne.b32 p, %98, 0; " WGMMA_N(192) R60 R10(6) R10(7)
                               R10(8) "%90,%91,%92,%93,%94,%95}, %96, %97, p, 1, 1, 0, %99;}"
                           : D32(0), D32(8), D32(16)
                           : "l"(a), "l"(b), "r"(int(add)), "n"(lb == Layout::plain)));
}
#undef D4
#undef D32
#undef R10
#undef R30
#undef R60
#undef WGMMA_N
__device__ inline void wgmma_begin() { WGMMA(asm volatile("wgmma.fence.sync.aligned;" ::: "memory")); }
__device__ inline void wgmma_commit() { WGMMA(asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory")); }
template <int NT, int M>
__device__ inline void changes_here(Accumulator<NT> (&acc)[M]) {  // not earlier, not later
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(acc[m].v[t][i])::"memory");
}
template <int team, int later, class... Acc>
__device__ inline void products_wait(Acc&... acc) {  // what was computed into acc before goes on before
    if constexpr (team == 4) {
        (changes_here(acc), ...);
        WGMMA(asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(later) : "memory"));
        (changes_here(acc), ...);
    }
}

// acc[m] = a[m] b, or += if `add`. b: the tile as it is (plain) or transposed.
template <Layout lb, int kRows, int kP, int K, int NT, int M>
__device__ inline void product(Accumulator<NT> (&acc)[M], const Rows<float, K> (&a)[M], Tile<float, kRows, kP, 1> b,
                               const float* tile, bool add) {
#pragma unroll
    for (int m = 0; m < M; ++m) {
        if (!add) acc[m].zero();
        multiply<Layout::plain, lb>(acc[m], a[m].p, a[m].ld, tile, b.ld, K);
    }
}
// The fragments of b that `lane` loads for inner dimension 16 k .. and columns 8 t .. are matrix_at(k, t).
template <Layout lb, int kRows, int kP>
__device__ inline void load_right(uint32_t (&f)[4], Tile<bf16, kRows, kP, 1> b, const bf16* tile, int k, int t) {
    const int r = lane_id() % 8, m = lane_id() / 8, low = m % 2 * 8, high = m / 2 * 8;
    if (lb == Layout::plain) load_matrices<true>(f, tile + b.at(16 * k + r + low, 8 * t + high));
    else load_matrices<false>(f, tile + b.at(8 * t + r + high, 16 * k + low));
}
template <Layout lb, int kRows, int kP, int K, int NT, int M>
__device__ inline void product(Accumulator<NT> (&acc)[M], const Rows<bf16, K> (&a)[M], Tile<bf16, kRows, kP, 1> b,
                               const bf16* tile, bool add) {
    if (!add)
#pragma unroll
        for (int m = 0; m < M; ++m) acc[m].zero();
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
#pragma unroll
        for (int t = 0; t < NT; t += 2) {
            uint32_t f[4];
            load_right<lb>(f, b, tile, k, t);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma16816(acc[m].v[t], a[m].r[k], f[0], f[1]);
                mma16816(acc[m].v[t + 1], a[m].r[k], f[2], f[3]);
            }
        }
}
template <Layout lb, int kRows, int kP, int K, int NT, int M>
__device__ inline void product(Accumulator<NT> (&acc)[M], const Rows<bf16, K> (&a)[M], Tile<bf16, kRows, kP, 4> b,
                               const bf16* tile, bool add) {
    const uint32_t start = b.start(tile);
    wgmma_begin();
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int t = 0; t < NT; t += 8)
#pragma unroll
            for (int k = 0; k < K / 16; ++k) {
                const int at =
                    lb == Layout::plain ? t / 8 * b.panel + 16 * k * b.ld : k / 4 * b.panel + 8 * t * b.ld + k % 4 * 16;
                wgmma<lb>(acc[m].v + t, a[m].r[k], b.describe(start + at / 8), add || k > 0);
            }
    wgmma_commit();
}

// The block's own operand, a tile of N::own rows: of each warp 16 M rows, times others transposed: acc[m] = own[m] b^T.
template <class N, class A, int kP, bool keep>
struct Own {
    static_assert(N::team == 1, "wgmma reads own rows from shared memory");
    using TileA = Tile<A, N::own, kP, 1>;
    Rows<A, kP> rows[N::M];
    __device__ void load(const A* tile) {
#pragma unroll
        for (int m = 0; m < N::M; ++m) load(rows[m], tile, N::team_row() + N::my_row(m));
    }
    __device__ static void load(Rows<float, kP>& r, const float* tile, int row) {
        r.load(tile + TileA::at(row, 0), TileA::ld);
    }
    __device__ static void load(Rows<bf16, kP>& r, const bf16* tile, int row) {
#pragma unroll
        for (int k = 0; k < kP / 16; ++k)
            load_matrices<false>(r.r[k], tile + TileA::at(row + lane_id() % 16, 16 * k + lane_id() / 16 * 8));
    }
    template <class B, int NT>
    __device__ void times(Accumulator<NT> (&acc)[N::M], B b, const A* tile) const {
        product<Layout::transposed>(acc, rows, b, tile, false);
    }
};
template <class N, int kP>
struct Own<N, bf16, kP, false> {
    using TileA = Tile<bf16, N::own, kP, N::team>;
    const bf16* own;  // the team's first row
    __device__ void load(const bf16* tile) { own = tile + N::team_row() * TileA::ld; }
    template <int kRows, int NT>
    __device__ void times(Accumulator<NT> (&acc)[N::M], Tile<bf16, kRows, kP, 1> b, const bf16* tile) const {
#pragma unroll
        for (int m = 0; m < N::M; ++m) acc[m].zero();
#pragma unroll
        for (int k = 0; k < kP / 16; ++k) {
            uint32_t a[N::M][4];
#pragma unroll
            for (int m = 0; m < N::M; ++m)
                load_matrices<false>(a[m], own + TileA::at(N::my_row(m) + lane_id() % 16, 16 * k + lane_id() / 16 * 8));
#pragma unroll
            for (int t = 0; t < NT; t += 2) {
                uint32_t f[4];
                load_right<Layout::transposed>(f, b, tile, k, t);
#pragma unroll
                for (int m = 0; m < N::M; ++m) {
                    mma16816(acc[m].v[t], a[m], f[0], f[1]);
                    mma16816(acc[m].v[t + 1], a[m], f[2], f[3]);
                }
            }
        }
    }
    template <int kRows, int NT>
    __device__ void times(Accumulator<NT> (&acc)[N::M], Tile<bf16, kRows, kP, 4> b, const bf16* tile) const {
        const uint32_t start_a = TileA::start(own), start_b = b.start(tile);
        wgmma_begin();
#pragma unroll
        for (int m = 0; m < N::M; ++m)
#pragma unroll
            for (int t = 0; t < NT; t += 8)
#pragma unroll
                for (int k = 0; k < kP / 16; ++k)
                    wgmma<Layout::transposed>(
                        acc[m].v + t,
                        TileA::describe(start_a + (k / 4 * TileA::panel + 64 * m * TileA::ld + k % 4 * 16) / 8),
                        b.describe(start_b + (k / 4 * b.panel + 8 * t * b.ld + k % 4 * 16) / 8), k > 0);
        wgmma_commit();
    }
};

// Left operands of zeros.
template <class A, int K, int M>
__device__ inline void nothing(Rows<A, K> (&rows)[M], A* patch) {
    Accumulator<K / 8> zeros;
    zeros.zero();
#pragma unroll
    for (int m = 0; m < M; ++m) rows[m].take(zeros, patch);
}

// Where tiles come from: the rows of one head of one sequence. load() takes them from `row` on; rows past `end` and columns
// past P become zero.
struct Maps {  // the same in the words of the copy engine (make_map), for wgmma
    CUtensorMap q, k, v, dy;
};
template <class A, int team>
struct Source {
    const A* from;
    int64 ld, P;
    bool aligned;
    __device__ Source(const CUtensorMap&, const A* p, int64 ld_, int64 sequence, int64 b, int64 h, int64 P_)
        : from(p + b * sequence + h * P_), ld(ld_), P(P_) {
        constexpr int64 size = sizeof(A);
        aligned = (uintptr_t(p) | uintptr_t(ld * size) | uintptr_t(sequence * size) | uintptr_t(P * size)) % 16 == 0;
    }
    template <int threads, int kRows, int kP>
    __device__ void load(Tile<A, kRows, kP, team> to, A* tile, int row, int end, uint32_t) const {
        constexpr int W = 16 / int(sizeof(A)), per_row = kP / W, step = threads / per_row;
        static_assert(threads % per_row == 0, "a thread copies the same place of every step-th row");
        const A* source = from + row * ld;
        if (!aligned) {
            for (int i = int(threadIdx.x); i < kRows * kP; i += threads) {
                const int r = i / kP, c = i % kP;
                tile[to.at(r, c)] = row + r < end && c < P ? source[r * ld + c] : from_float<A>(0.0f);
            }
            return;
        }
        const int r0 = int(threadIdx.x) / per_row, c = int(threadIdx.x) % per_row * W;
        const int inside = c < P ? end - row - r0 : 0;
        const uint32_t at = shared_address(tile + to.at(r0, c));
        source += r0 * ld + c;
#pragma unroll
        for (int r = 0; r < kRows; r += step, source += step * ld)
            if (kRows % step == 0 || r + r0 < kRows)
                copy16(at + r * to.ld * int(sizeof(A)), r < inside ? source : from, r < inside);
    }
};
// A box of a tensor (make_map) from these coordinates on: one thread asks, the barrier counts the bytes.
__device__ inline void copy_box(uint32_t to, const CUtensorMap* map, int c, int h, int row, int b, uint32_t barrier) {
    WGMMA(
        asm volatile("cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                     " [%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
                     "l"(map), "r"(c), "r"(h), "r"(row), "r"(b), "r"(barrier)
                     : "memory"));
}
template <>
struct Source<bf16, 4> {
    const CUtensorMap* map;
    int b, h;
    __device__ Source(const CUtensorMap& m, const bf16*, int64, int64, int64 b_, int64 h_, int64)
        : map(&m), b(int(b_)), h(int(h_)) {}
    template <int threads, int kRows, int kP>
    __device__ void load(Tile<bf16, kRows, kP, 4> to, bf16* tile, int row, int, uint32_t barrier) const {
#pragma unroll
        for (int c = 0; c < kP; c += 64) copy_box(shared_address(tile + c / 64 * to.panel), map, c, h, row, b, barrier);
    }
};

// The tiles of the other side pass through N::stages buffers, tile i through number i % stages. Warps do not wait for each
// other at every step: two mbarriers tell when the tile is there ("filled") and when no warp needs it any more ("free");
// they have completed i / stages times before. Step i begins to copy tile i + stages / 2 over tile i - stages / 2.
template <class N>
struct Ring {
    uint32_t barriers;  // of each buffer "filled", then of each "free"
    static constexpr int stages = N::stages, ahead = stages / 2, kBytes = 2 * stages * 8;
    static constexpr bool engine = N::team == 4;  // warp i % 8 asks the copy engine for tile i, else all threads copy
    static_assert(!engine || N::warps >= 8, "there are eight to ask in turn: it costs a hundred instructions");
    const int warp = __shfl_sync(~0u, int(threadIdx.x) / 32, 0);
    static_assert(engine || stages == 4,
                  "with four, a thread's copies have had a step's time when arrived() waits for all");
    __device__ explicit Ring(void* memory) : barriers(shared_address(memory)) {
        if (threadIdx.x < 2 * stages)
            init_barrier(barriers + 8 * threadIdx.x, !engine ? N::threads : threadIdx.x < stages ? 1 : N::warps);
        if (engine) WGMMA(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));
        __syncthreads();
    }
    __device__ static int buffer(int i) { return i & (stages - 1); }
    __device__ uint32_t filled(int i) const { return barriers + 8 * buffer(i); }
    __device__ uint32_t free(int i) const { return barriers + 8 * (stages + buffer(i)); }
    __device__ static void tell(uint32_t barrier) {  // all threads, or one for its warp
        __syncwarp();
        if (!engine || lane_id() == 0) arrive(barrier);
    }
    __device__ static void wait(uint32_t barrier, unsigned i) { await(barrier, i / stages); }
    // load(barrier), which copies so many bytes for tile i.
    template <class F>
    __device__ void ask(int i, int bytes, const F& load) const {
        if (engine) {
            if (warp != (i & 7)) return;
            uint32_t chosen = 0;  // one thread of the warp, and the compiler knows that it is one
            WGMMA(asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(chosen)));
            if (!chosen) return;
            WGMMA(asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared.b64 s, [%0], %1;}" ::"r"(filled(i)),
                               "r"(bytes)
                               : "memory"));
        }
        load(filled(i));
    }
    // This thread's copies for tile i, and all before, are there.
    __device__ void arrived(int i) const {
        if (engine) return;
        copies_done();
        tell(filled(i));
    }
    __device__ void wait_filled(int i) const { wait(filled(i), i); }
    __device__ bool is_filled(unsigned i) const {  // asked a step before, as the answer takes its time
        uint32_t yes;
        asm volatile("{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                     : "=r"(yes)
                     : "r"(filled(int(i))), "r"(i / stages & 1)
                     : "memory");
        return yes;
    }
    __device__ void release(int i) const { tell(free(i)); }
    // During step i of `all`: begin(i + ahead) as soon as it may. Before the first step come begin(0) to begin(ahead - 1).
    template <class F>
    __device__ void advance(int i, int all, const F& begin) const {
        arrived(i + 1);
        if (i + ahead >= all) return;
        if (i >= ahead && (!engine || warp == ((i + ahead) & 7))) wait(free(i - ahead), i - ahead);
        begin(i + ahead);
    }
};

// Which tile of which (sequence, head) a block has. A few heads walk over all their tiles together, so that what their
// blocks read stays in the L2 cache; the longest tiles come first.
struct Work {
    int tile;
    int64 head;
};
__device__ inline Work my_work(int64 heads, int64 tiles) {
    constexpr int64 kTogether = 32;
    const int64 first = blockIdx.x / (kTogether * tiles) * kTogether, i = blockIdx.x - first * tiles;
    const int64 together = min(kTogether, heads - first);
    return {int(i / together), first + i % together};
}

// Of a tile of scores of the team's rows those that causality hides: where the column, plus `ahead`, exceeds the row (or,
// `keys`: the row, plus `ahead`, the column).
template <class N, bool keys, int NT>
__device__ inline void hide(Accumulator<NT> (&score)[N::M], int ahead) {
    if (ahead + (keys ? N::team_rows : 8 * NT) <= 1) return;  // nothing
#pragma unroll
    for (int m = 0; m < N::M; ++m)
#pragma unroll
        for (int t = 0; t < NT; ++t)
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int row = N::my_row(m) + acc_row() + j / 2 * 8, column = 8 * t + acc_col() + j % 2;
                if (keys ? ahead + row > column : ahead + column > row) score[m].v[t][j] = -INFINITY;
            }
}
// The block's result, `rows` rows of P numbers, ld apart, times `scale`.
template <class N, class A, int NT>
__device__ inline void store_rows(A* to, int64 ld, const Accumulator<NT> (&acc)[N::M], float scale, int rows, int64 P) {
#pragma unroll
    for (int m = 0; m < N::M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int r = N::team_row() + N::my_row(m) + acc_row() + 8 * half;
            if (r >= rows) continue;
#pragma unroll
            for (int c = 0; c < NT; ++c)
                if (8 * c + acc_col() < P)
                    store2(to + r * ld + 8 * c + acc_col(), acc[m].v[c][2 * half] * scale,
                           acc[m].v[c][2 * half + 1] * scale);
        }
}

// ---- 6b  Forward -----------------------------------------------------------------------------------------------------
// One block per tile of queries of one (sequence, head). Shared: own q; tiles of k and v. Online softmax in powers
// of 2: scores are multiplied by log2(e) / sqrt(P), and every power is taken relative to `top`, one number per row. It
// need not be the largest score: only if a score exceeds it by more than 8 is it raised to the largest so far, and what
// was summed before scaled down. Until then sums grow by 2^8 at most, which costs no accuracy.
//
// Step i issues its scores and then p v of step i - 1, which goes on beside the exponentials of step i. p v of step -1, with
// p = 0, is how `out` begins; that of the last step comes after the loop.
template <class A, int kP, class N>
__global__ void __launch_bounds__(N::threads, N::blocks)
    attention_forward_kernel(A* y, float* lse, const A* q, const A* k, const A* v, const __grid_constant__ Maps maps,
                             AttentionShape n, int64 before, float scale) {
    constexpr int M = N::M, kStep = N::step;
    using TileQ = Tile<A, N::own, kP, N::team>;
    using TileK = Tile<A, kStep, kP, N::team>;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    A* tile_q = reinterpret_cast<A*>(attention_memory);
    A* tiles_kv = tile_q + TileQ::size;  // k, v, k, v, ...
    A* patches = tiles_kv + 2 * N::stages * TileK::size;
    A* patch = patches + int(threadIdx.x) / 32 * kPatch<A>;
    const Ring<N> ring(patches + N::warps * kPatch<A>);
    const int64 tiles = (n.T + N::own - 1) / N::own;
    const Work work = my_work(n.B * n.H, tiles);
    const int64 b = work.head / n.H, h = work.head % n.H, t0 = (tiles - 1 - work.tile) * N::own, row0 = b * n.T + t0;
    const int rows = int(min(int64(N::own), n.T - t0)), first_position = int(before + t0), keys = first_position + rows,
              steps = (keys + kStep - 1) / kStep;
    const int64 hkv = h / (n.H / n.Hkv);
    const Source<A, N::team> source_q(maps.q, q, n.ld_q, n.T * n.ld_q, b, h, n.P),
        source_k(maps.k, k, n.ld_kv, n.seq_kv, b, hkv, n.P), source_v(maps.v, v, n.ld_kv, n.seq_kv, b, hkv, n.P);
    const auto tile_k = [&](int i) { return tiles_kv + Ring<N>::buffer(i) * 2 * TileK::size; };
    const auto load_keys = [&](int i, uint32_t barrier) {
        source_k.template load<N::threads>(TileK(), tile_k(i), i * kStep, keys, barrier);
        source_v.template load<N::threads>(TileK(), tile_k(i) + TileK::size, i * kStep, keys, barrier);
    };
    constexpr int kBytes = 2 * TileK::size * int(sizeof(A)), kOwnBytes = TileQ::size * int(sizeof(A));
    const auto begin = [&](int i) { ring.ask(i, kBytes, [&](uint32_t barrier) { load_keys(i, barrier); }); };
    ring.ask(0, kOwnBytes + kBytes, [&](uint32_t barrier) {
        source_q.template load<N::threads>(TileQ(), tile_q, int(t0), int(n.T), barrier);
        load_keys(0, barrier);
    });
    for (int i = 1; i < min(ring.ahead, steps); ++i) begin(i);
    ring.arrived(0);
    ring.wait_filled(0);
    Own<N, A, kP, N::keep> own_q;
    own_q.load(tile_q);
    const float log2_scale = scale * kLog2e;
    const int team_position = first_position + N::team_row();  // of the team's first query

    Accumulator<kP / 8> out[M];
    float top[M][2], z[M][2];  // of rows acc_row() and acc_row() + 8; z: this thread's share of the row's sum
#pragma unroll
    for (int m = 0; m < M; ++m) {
        top[m][0] = top[m][1] = -INFINITY;
        z[m][0] = z[m][1] = 0;
    }
    Rows<A, kStep> p[M];
    nothing(p, patch);
    const A* last_v = tile_k(0) + TileK::size;
    bool there = true;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        Accumulator<kStep / 8> score[M];
        if (!there) ring.wait_filled(i);
        own_q.times(score, TileK(), tile_k(i));
        product<Layout::plain>(out, p, TileK(), last_v, i > 0);
        last_v = tile_k(i) + TileK::size;
        ring.advance(i, steps, begin);
        there = ring.is_filled(i + 1);
        products_wait<N::team, 1>(score);
        const int ahead = i * kStep - team_position;  // query r of the team sees keys up to r - ahead of this step
        hide<N, false>(score, ahead);
        float shrink[M][2];
        bool grows = false;
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                float x = -INFINITY;
#pragma unroll
                for (int t = 0; t < kStep / 8; ++t)
                    x = fmaxf(x, fmaxf(score[m].v[t][2 * half], score[m].v[t][2 * half + 1]));
                shrink[m][half] = quad_max(x) * log2_scale;
                grows |= shrink[m][half] > top[m][half] + 8;
            }
        grows = __any_sync(~0u, grows);
        if (grows)  // at the first step: it has key 0, which all see, so that top is finite from there on
#pragma unroll
            for (int m = 0; m < M; ++m)
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    const float x = fmaxf(top[m][half], shrink[m][half]);
                    shrink[m][half] = exp2_fast(top[m][half] - x);
                    top[m][half] = x;
                    z[m][half] *= shrink[m][half];
                }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int t = 0; t < kStep / 8; ++t)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    score[m].v[t][j] = exp2_fast(score[m].v[t][j] * log2_scale - top[m][j / 2]);
                    z[m][j / 2] += score[m].v[t][j];
                }
        products_wait<N::team, 0>(score, out);
        if (i > 0) ring.release(i - 1);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            if (grows) out[m].scale_rows(shrink[m][0], shrink[m][1]);
            p[m].take(score[m], patch);
        }
    }
    product<Layout::plain>(out, p, TileK(), last_v, true);
    products_wait<N::team, 0>(out);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        const float total[2] = {quad_sum(z[m][0]), quad_sum(z[m][1])};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = N::team_row() + N::my_row(m) + acc_row() + 8 * half;
            if (t < rows && lane_id() % 4 == 0) lse[(row0 + t) * n.H + h] = top[m][half] * kLn2 + logf(total[half]);
        }
        out[m].scale_rows(1 / total[0], 1 / total[1]);
    }
    store_rows<N>(y + (row0 * n.H + h) * n.P, n.H * n.P, out, 1, rows, n.P);
}

// ---- 6c  Backward ----------------------------------------------------------------------------------------------------
// In the reference's letters: p again from lse, dp = dy v^T, dz = p (dp - dy.y) / sqrt(P), then
//     dv = p^T dy     dk = dz^T q     dq = dz k
// Two kernels, so that every output has one owner and no atomics are needed: one owns keys, one owns queries. Both make
// p and dp again, 7 products in place of 5. The alternative, dq's share of every tile of keys written to memory and
// added up in order, moves T/128 times dq's size in fp32.

// stats (2,B,H,T padded with zeros): log2(e) lse and dy_t . y_t. Eight threads share a row.
static constexpr int kStatsPad = 128;
__host__ __device__ inline int64 padded_stats(int64 T) { return (T + kStatsPad - 1) / kStatsPad * kStatsPad; }
template <class A, int W>
__global__ void attention_dot_kernel(float* stats, const A* dy, const A* y, const float* lse, AttentionShape n) {
    const int64 i = int64(blockIdx.x) * (blockDim.x / 8) + threadIdx.x / 8, padded = padded_stats(n.T);
    const int64 h = i % n.H, t = i / n.H % padded, b = i / n.H / padded, row = (b * n.T + t) * n.H + h;  // of y
    const bool inside = b < n.B && t < n.T;
    float s = 0;
    if (inside)
        for (int64 p = threadIdx.x % 8 * W; p < n.P; p += 8 * W) {
            float a[W], c[W];
            load<W>(a, dy + row * n.P + p);
            load<W>(c, y + row * n.P + p);
#pragma unroll
            for (int j = 0; j < W; ++j) s += a[j] * c[j];
        }
    s = quad_sum(s);
    s += __shfl_xor_sync(~0u, s, 4);
    if (threadIdx.x % 8 > 0 || b >= n.B) return;
    float* to = stats + (b * n.H + h) * padded + t;
    to[0] = inside ? lse[row] * kLog2e : 0;
    to[n.B * n.H * padded] = s;
}

// One block per tile of keys of one (sequence, key/value head); it walks over the heads of the group and the queries
// from the diagonal on. Rows of the accumulators are keys, columns are queries. Shared: own k and v; tiles of q, dy and
// stats. Queries past the end are zeros, dy included, and add nothing. Step i issues, one after the other,
//     p = k q^T,   dp = v dy^T,   dv += p dy and dk += dz q of step i - 1
// and makes p and dz = p (dp - dy.y) while the last two go on. p and dz of step -1 are zero, as in the forward.
template <class A, int kP, class N>
__global__ void __launch_bounds__(N::threads, N::blocks)
    attention_backward_kv_kernel(A* dk, A* dv, const A* dy, const A* q, const A* k, const A* v,
                                 const __grid_constant__ Maps maps, const float* stats, AttentionShape n, float scale) {
    constexpr int M = N::M, kStep = N::step;
    using TileQ = Tile<A, kStep, kP, N::team>;
    using TileK = Tile<A, N::own, kP, N::team>;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    A* tile_k = reinterpret_cast<A*>(attention_memory);
    A* tile_v = tile_k + TileK::size;
    A* tiles_q = tile_v + TileK::size;                                                     // q, dy, q, dy, ...
    float* tiles_stats = reinterpret_cast<float*>(tiles_q + 2 * N::stages * TileQ::size);  // log-sum-exp, dy . y, ...
    A* patches = reinterpret_cast<A*>(tiles_stats + 2 * N::stages * kStep);
    A* patch = patches + int(threadIdx.x) / 32 * kPatch<A>;
    const Ring<N> ring(patches + N::warps * kPatch<A>);
    const Work work = my_work(n.B * n.Hkv, (n.S + N::own - 1) / N::own);
    const int64 b = work.head / n.Hkv, hkv = work.head % n.Hkv, group = n.H / n.Hkv;
    const int s0 = work.tile * N::own, count = int(min(int64(N::own), n.S - s0)), T = int(n.T), before = int(n.S - n.T);
    const int64 kv0 = b * n.seq_kv + s0 * n.ld_kv + hkv * n.P;
    const int first = max(0, s0 - before) / kStep * kStep;           // queries that see s0 are in this step and after
    const int steps = (T - first + kStep - 1) / kStep * int(group);  // at least one, as the last query sees all keys
    const auto tile_q = [&](int i) { return tiles_q + Ring<N>::buffer(i) * 2 * TileQ::size; };
    const auto tile_stats = [&](int i) { return tiles_stats + Ring<N>::buffer(i) * 2 * kStep; };
    const auto next = [&](int& t) { t = t + kStep < T ? t + kStep : first; };
    const Source<A, N::team> source_k(maps.k, k, n.ld_kv, n.seq_kv, b, hkv, n.P),
        source_v(maps.v, v, n.ld_kv, n.seq_kv, b, hkv, n.P);
    int load_h = int(hkv * group);  // what is copied next
    int load_t = first;
    const auto load_queries = [&](int i, uint32_t barrier) {
        const Source<A, N::team> source_q(maps.q, q, n.ld_q, n.T * n.ld_q, b, load_h, n.P),
            source_dy(maps.dy, dy, n.H * n.P, n.T * n.H * n.P, b, load_h, n.P);
        source_q.template load<N::threads>(TileQ(), tile_q(i), load_t, T, barrier);
        source_dy.template load<N::threads>(TileQ(), tile_q(i) + TileQ::size, load_t, T, barrier);
        const float* from = stats + (b * n.H + load_h) * padded_stats(n.T) + load_t;
        const uint32_t at = shared_address(tile_stats(i));
#pragma unroll
        for (int part = 0; part < 2; ++part, from += n.B * n.H * padded_stats(n.T))
            if (Ring<N>::engine)
                WGMMA(
                    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
                                 " [%0], [%1], %2, [%3];" ::"r"(at + part * kStep * 4),
                                 "l"(from), "r"(kStep * 4), "r"(barrier)
                                 : "memory"));
            else if (threadIdx.x < kStep / 4) copy16(at + part * kStep * 4 + 16 * threadIdx.x, from + 4 * threadIdx.x);
    };
    constexpr int kBytes = 2 * TileQ::size * int(sizeof(A)) + kStep * 8, kOwnBytes = 2 * TileK::size * int(sizeof(A));
    const auto move_on = [&] {  // in all threads, so that the compiler knows that all have the same
        next(load_t);
        load_h += load_t == first;
    };
    const auto begin = [&](int i) {
        ring.ask(i, kBytes, [&](uint32_t barrier) { load_queries(i, barrier); });
        move_on();
    };
    static_assert(kStep / 4 <= N::threads && kStatsPad % kStep == 0, "a thread copies four, and all are there");
    ring.ask(0, kOwnBytes + kBytes, [&](uint32_t barrier) {
        source_k.template load<N::threads>(TileK(), tile_k, s0, int(n.S), barrier);
        source_v.template load<N::threads>(TileK(), tile_v, s0, int(n.S), barrier);
        load_queries(0, barrier);
    });
    move_on();
    for (int i = 1; i < min(ring.ahead, steps); ++i) begin(i);
    ring.arrived(0);
    ring.wait_filled(0);
    Own<N, A, kP, N::keep> own_k, own_v;
    own_k.load(tile_k);
    own_v.load(tile_v);
    const float log2_scale = scale * kLog2e;
    const int team_position = s0 + N::team_row();

    Accumulator<kP / 8> acc_dk[M], acc_dv[M];
    Rows<A, kStep> operand_p[M], operand_dz[M];
    A* patch_dz = patch + kPatch<A> / 2;
    static_assert(kPatch<A> == 0 || 2 * 16 * (kStep + kTilePad<A>) <= kPatch<A>, "a patch holds two operands");
    nothing(operand_p, patch);
    nothing(operand_dz, patch_dz);
    const A* last_q = tile_q(0);
    bool there = true;
#pragma unroll 1
    for (int i = 0, t0 = first; i < steps; ++i, next(t0)) {
        Accumulator<kStep / 8> p[M], dz[M];
        if (!there) ring.wait_filled(i);
        const float* stat = tile_stats(i) + acc_col();
        float2 lse[kStep / 8], dot[kStep / 8];  // of two queries; read long before they are needed
#pragma unroll
        for (int c = 0; c < kStep / 8; ++c) lse[c] = *reinterpret_cast<const float2*>(stat + 8 * c);
        own_k.times(p, TileQ(), tile_q(i));
        own_v.times(dz, TileQ(), tile_q(i) + TileQ::size);
        product<Layout::plain>(acc_dv, operand_p, TileQ(), last_q + TileQ::size, i > 0);
        product<Layout::plain>(acc_dk, operand_dz, TileQ(), last_q, i > 0);
        last_q = tile_q(i);
        ring.advance(i, steps, begin);
        there = ring.is_filled(i + 1);
        const int ahead = team_position - (before + t0);  // key r of the team is seen by queries r + ahead on
        products_wait<N::team, 2>(p, dz);
#pragma unroll
        for (int c = 0; c < kStep / 8; ++c) dot[c] = *reinterpret_cast<const float2*>(stat + kStep + 8 * c);
        hide<N, true>(p, ahead);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int c = 0; c < kStep / 8; ++c)
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    p[m].v[c][j] = exp2_fast(p[m].v[c][j] * log2_scale - (j % 2 ? lse[c].y : lse[c].x));
                    dz[m].v[c][j] = p[m].v[c][j] * (dz[m].v[c][j] - (j % 2 ? dot[c].y : dot[c].x));
                }
        products_wait<N::team, 0>(p, dz, acc_dv, acc_dk);
        if (i > 0) ring.release(i - 1);
#pragma unroll
        for (int m = 0; m < M; ++m) {
            operand_p[m].take(p[m], patch);
            operand_dz[m].take(dz[m], patch_dz);
        }
    }
    product<Layout::plain>(acc_dv, operand_p, TileQ(), last_q + TileQ::size, true);
    product<Layout::plain>(acc_dk, operand_dz, TileQ(), last_q, true);
    products_wait<N::team, 0>(acc_dv, acc_dk);
    store_rows<N>(dk + kv0, n.ld_kv, acc_dk, scale, count, n.P);
    store_rows<N>(dv + kv0, n.ld_kv, acc_dv, 1, count, n.P);
}

// One block per tile of queries of one (sequence, head), as in the forward. Shared: own q and dy; tiles of k and v.
template <class A, int kP, class N>
__global__ void __launch_bounds__(N::threads, N::blocks)
    attention_backward_q_kernel(A* dq, const A* dy, const A* q, const A* k, const A* v,
                                const __grid_constant__ Maps maps, const float* stats, AttentionShape n, float scale) {
    constexpr int M = N::M, kStep = N::step;
    using TileQ = Tile<A, N::own, kP, N::team>;
    using TileK = Tile<A, kStep, kP, N::team>;
    extern __shared__ __align__(1024) unsigned char attention_memory[];
    A* tile_q = reinterpret_cast<A*>(attention_memory);
    A* tile_dy = tile_q + TileQ::size;
    A* tiles_kv = tile_dy + TileQ::size;  // k, v, k, v, ...
    A* patches = tiles_kv + 2 * N::stages * TileK::size;
    A* patch = patches + int(threadIdx.x) / 32 * kPatch<A>;
    const Ring<N> ring(patches + N::warps * kPatch<A>);
    const int64 tiles = (n.T + N::own - 1) / N::own;
    const Work work = my_work(n.B * n.H, tiles);
    const int64 b = work.head / n.H, h = work.head % n.H, t0 = (tiles - 1 - work.tile) * N::own, row0 = b * n.T + t0;
    const int rows = int(min(int64(N::own), n.T - t0)), first_position = int(n.S - n.T + t0),
              keys = first_position + rows, steps = (keys + kStep - 1) / kStep;
    const int64 hkv = h / (n.H / n.Hkv);
    const Source<A, N::team> source_q(maps.q, q, n.ld_q, n.T * n.ld_q, b, h, n.P),
        source_dy(maps.dy, dy, n.H * n.P, n.T * n.H * n.P, b, h, n.P),
        source_k(maps.k, k, n.ld_kv, n.seq_kv, b, hkv, n.P), source_v(maps.v, v, n.ld_kv, n.seq_kv, b, hkv, n.P);
    const auto tile_k = [&](int i) { return tiles_kv + Ring<N>::buffer(i) * 2 * TileK::size; };
    const auto load_keys = [&](int i, uint32_t barrier) {
        source_k.template load<N::threads>(TileK(), tile_k(i), i * kStep, keys, barrier);
        source_v.template load<N::threads>(TileK(), tile_k(i) + TileK::size, i * kStep, keys, barrier);
    };
    constexpr int kBytes = 2 * TileK::size * int(sizeof(A)), kOwnBytes = 2 * TileQ::size * int(sizeof(A));
    const auto begin = [&](int i) { ring.ask(i, kBytes, [&](uint32_t barrier) { load_keys(i, barrier); }); };
    ring.ask(0, kOwnBytes + kBytes, [&](uint32_t barrier) {
        source_q.template load<N::threads>(TileQ(), tile_q, int(t0), int(n.T), barrier);
        source_dy.template load<N::threads>(TileQ(), tile_dy, int(t0), int(n.T), barrier);
        load_keys(0, barrier);
    });
    for (int i = 1; i < min(ring.ahead, steps); ++i) begin(i);
    float2 stat[M][2];  // of rows acc_row() and acc_row() + 8; past the end: p = 2^-inf = 0
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int t = N::team_row() + N::my_row(m) + acc_row() + 8 * half;
            const float* from = stats + work.head * padded_stats(n.T) + t0 + t;
            stat[m][half] =
                t < rows ? make_float2(from[0], from[n.B * n.H * padded_stats(n.T)]) : make_float2(INFINITY, 0);
        }
    ring.arrived(0);
    ring.wait_filled(0);
    Own<N, A, kP, N::keep> own_q, own_dy;
    own_q.load(tile_q);
    own_dy.load(tile_dy);
    const float log2_scale = scale * kLog2e;
    const int team_position = first_position + N::team_row();

    Accumulator<kP / 8> out[M];
    Rows<A, kStep> operand[M];
    nothing(operand, patch);
    const A* last_k = tile_k(0);
    bool there = true;
#pragma unroll 1
    for (int i = 0; i < steps; ++i) {
        Accumulator<kStep / 8> p[M], dz[M];
        if (!there) ring.wait_filled(i);
        own_q.times(p, TileK(), tile_k(i));
        own_dy.times(dz, TileK(), tile_k(i) + TileK::size);
        product<Layout::plain>(out, operand, TileK(), last_k, i > 0);
        last_k = tile_k(i);
        ring.advance(i, steps, begin);
        there = ring.is_filled(i + 1);
        const int ahead = i * kStep - team_position;
        products_wait<N::team, 1>(p, dz);
        hide<N, false>(p, ahead);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int c = 0; c < kStep / 8; ++c)
#pragma unroll
                for (int j = 0; j < 4; ++j)
                    dz[m].v[c][j] =
                        exp2_fast(p[m].v[c][j] * log2_scale - stat[m][j / 2].x) * (dz[m].v[c][j] - stat[m][j / 2].y);
        products_wait<N::team, 0>(dz, out);
        if (i > 0) ring.release(i - 1);
#pragma unroll
        for (int m = 0; m < M; ++m) operand[m].take(dz[m], patch);
    }
    product<Layout::plain>(out, operand, TileK(), last_k, true);
    products_wait<N::team, 0>(out);
    store_rows<N>(dq + row0 * n.ld_q + h * n.P, n.ld_q, out, scale, rows, n.P);
}

// ---- 6d  Launchers ---------------------------------------------------------------------------------------------------
static constexpr int64 kAttentionMaxP = 128;

// The fastest of those tried on an H200 (docs/experiments.md). Those of one warp per team also fit into the 99 KB of shared
// memory of the smaller GPUs (float with kP = 128 excepted).
template <class A, int kP, int team>
struct Tilings;
template <int kP>
struct Tilings<float, kP, 1> {
    using Forward = Tiling<1, 1, 4, 16, 4, true, 1>;
    using Keys = Forward;
    using Queries = Forward;
};
template <>
struct Tilings<bf16, 64, 1> {
    using Forward = Tiling<1, 2, 4, 32, 4, true, 2>;
    using Keys = Tiling<1, 2, 4, 32, 4, false, 2>;
    using Queries = Tiling<1, 2, 4, 32, 4, true, 2>;
};
template <>
struct Tilings<bf16, 128, 1> {
    using Forward = Tiling<1, 2, 4, 16, 4, false, 2>;
    using Keys = Tiling<1, 1, 4, 16, 4, false, 2>;
    using Queries = Tiling<1, 1, 4, 16, 4, true, 2>;
};
template <>
struct Tilings<bf16, 64, 4> {
    using Forward = Tiling<4, 1, 8, 64, 4, false, 2>;
    using Keys = Tiling<4, 1, 8, 64, 8, false, 1>;
    using Queries = Tiling<4, 1, 12, 64, 8, false, 1>;
};
template <>
struct Tilings<bf16, 128, 4> {
    using Forward = Tiling<4, 1, 12, 64, 4, false, 1>;
    using Keys = Tiling<4, 1, 8, 64, 4, false, 1>;
    using Queries = Tiling<4, 1, 8, 64, 4, false, 1>;
};

// Whether this GPU runs code of ours that was compiled for sm_90a. Such code bounds this kernel differently, which the
// runtime tells.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define ATTENTION_MARK 128
#else
#define ATTENTION_MARK 32
#endif
__global__ void __launch_bounds__(ATTENTION_MARK) attention_mark_kernel() {}
#undef ATTENTION_MARK
static bool has_wgmma() {
    static const bool has = [] {
        cudaFuncAttributes a;
        CHECK_CUDA(cudaFuncGetAttributes(&a, (const void*)attention_mark_kernel));
        return a.maxThreadsPerBlock == 128;
    }();
    return has;
}

// Bytes of shared memory: so many own tiles, two of the other side and stats for each stage, the patches, the barriers.
template <class A, int kP, class N>
static size_t attention_shared(int own_tiles) {
    return sizeof(A) * size_t(own_tiles * Tile<A, N::own, kP, N::team>::size +
                              2 * N::stages * Tile<A, N::step, kP, N::team>::size + N::warps * kPatch<A>) +
           2 * N::stages * N::step * sizeof(float) + Ring<N>::kBytes;
}
// The rows of all heads and sequences as a tensor of four dimensions, of which the copy engine takes boxes of 64 columns of
// box_rows rows.
static CUtensorMap make_map(const bf16* p, int64 P, int64 heads, int64 rows, int64 B, int64 ld, int64 sequence,
                            int box_rows) {
    static const auto encode = [] {
        void* f = nullptr;
        cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
#if CUDART_VERSION >= 12050
        CHECK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &f, 12000, cudaEnableDefault, &found));
#else
        CHECK_CUDA(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &f, cudaEnableDefault, &found));
#endif
        if (found != cudaDriverEntryPointSuccess) fail("GPU: the driver has no cuTensorMapEncodeTiled");
        return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(f);
    }();
    CUtensorMap map;
    const cuuint64_t sizes[] = {cuuint64_t(P), cuuint64_t(heads), cuuint64_t(rows), cuuint64_t(B)};
    const cuuint64_t strides[] = {cuuint64_t(2 * P), cuuint64_t(2 * ld), cuuint64_t(2 * sequence)};  // bytes
    const cuuint32_t box[] = {64, 1, cuuint32_t(box_rows), 1}, every[] = {1, 1, 1, 1};
    const CUresult r = encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4, const_cast<bf16*>(p), sizes, strides, box,
                              every, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                              CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (r != CUDA_SUCCESS) fail("GPU: no map of a tensor: error %d", int(r));
    return map;
}
template <class A, int team>
static Maps make_maps(const A* q, const A* k, const A* v, const A* dy, const AttentionShape& n, int rows_q,
                      int rows_k) {
    Maps maps = {};
    if constexpr (team == 4) {
        maps.q = make_map(q, n.P, n.H, n.T, n.B, n.ld_q, n.T * n.ld_q, rows_q);
        maps.k = make_map(k, n.P, n.Hkv, n.S, n.B, n.ld_kv, n.seq_kv, rows_k);
        maps.v = make_map(v, n.P, n.Hkv, n.S, n.B, n.ld_kv, n.seq_kv, rows_k);
        if (dy) maps.dy = make_map(dy, n.P, n.H, n.T, n.B, n.H * n.P, n.T * n.H * n.P, rows_q);
    }
    return maps;
}
// Calls f(kP, team), as types: the padded width and the form of products for this call. The copy engine wants rows that
// begin at multiples of 16 bytes.
template <class A, class F>
static void attention_form(const A* q, const A* k, const A* v, const A* dy, const AttentionShape& n, const F& f) {
    const bool aligned = (uintptr_t(q) | uintptr_t(k) | uintptr_t(v) | uintptr_t(dy)) % 16 == 0 &&
                         (n.P | n.ld_q | n.ld_kv | n.seq_kv) % 8 == 0;
    with_number<64, 128>(n.P <= 64 ? 64 : 128, [&](auto kP) {
        if constexpr (std::is_same<A, float>::value) f(kP, std::integral_constant<int, 1>());
        else with_number<1, 4>(aligned && has_wgmma() ? 4 : 1, [&](auto team) { f(kP, team); });
    });
}
// `before` keys come before the first query.
template <class A>
static void attention_forward(A* y, float* lse, const A* q, const A* k, const A* v, const AttentionShape& n,
                              int64 before, cudaStream_t stream) {
    attention_form<A>(q, k, v, nullptr, n, [&](auto width, auto team) {
        constexpr int kP = decltype(width)::value, kTeam = decltype(team)::value;
        using N = typename Tilings<A, kP, kTeam>::Forward;
        launch("attention_forward", attention_forward_kernel<A, kP, N>, ceil_div(n.T, N::own) * n.B * n.H, N::threads,
               attention_shared<A, kP, N>(1), stream, y, lse, q, k, v,
               make_maps<A, kTeam>(q, k, v, nullptr, n, N::own, N::step), n, before, float(1 / std::sqrt(double(n.P))));
    });
}
// stats is scratch of 2 B H padded_stats(T) numbers.
template <class A>
static void attention_backward(A* dq, A* dk, A* dv, float* stats, const A* dy, const A* q, const A* k, const A* v,
                               const A* y, const float* lse, const AttentionShape& n, cudaStream_t stream) {
    const float scale = float(1 / std::sqrt(double(n.P)));
    const bool vectors = n.P % 8 == 0 && (uintptr_t(dy) | uintptr_t(y)) % 32 == 0;
    launch("attention_backward", vectors ? attention_dot_kernel<A, 8> : attention_dot_kernel<A, 1>,
           ceil_div(n.B * padded_stats(n.T) * n.H, 32), 256, 0, stream, stats, dy, y, lse, n);
    attention_form<A>(q, k, v, dy, n, [&](auto width, auto team) {
        constexpr int kP = decltype(width)::value, kTeam = decltype(team)::value;
        using NK = typename Tilings<A, kP, kTeam>::Keys;
        using NQ = typename Tilings<A, kP, kTeam>::Queries;
        launch("attention_backward", attention_backward_kv_kernel<A, kP, NK>, ceil_div(n.S, NK::own) * n.B * n.Hkv,
               NK::threads, attention_shared<A, kP, NK>(2), stream, dk, dv, dy, q, k, v,
               make_maps<A, kTeam>(q, k, v, dy, n, NK::step, NK::own), stats, n, scale);
        launch("attention_backward", attention_backward_q_kernel<A, kP, NQ>, ceil_div(n.T, NQ::own) * n.B * n.H,
               NQ::threads, attention_shared<A, kP, NQ>(2), stream, dq, dy, q, k, v,
               make_maps<A, kTeam>(q, k, v, dy, n, NQ::own, NQ::step), stats, n, scale);
    });
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
// One block of 8 warps sweeps the chunks of one (sequence, head). The state stays in its registers: it is cut into units of
// 16 x 32 numbers, and unit u belongs to warp u % 8 for the whole sweep. C, B, X are read once, Y is written once, and no
// Q x Q matrix leaves the chip. The chunk length is this kernel's own (SsdTiles::q), since the result does not depend on
// it; config.Q is for the reference. The backward needs S_in of every chunk: chunk_states (B,chunks,H,P,N) in A, since it
// is read as an operand.
//
// Tiles are padded: N and P to multiples of 32. A token past the end has C = B = X = 0, dt = 0, dA = 0: it changes
// nothing. These kernels take any shape and both types; 7d is the fast form for the usual ones.
//
// C and B in memory are not turned by RoPE yet: that happens on chip.
struct SsdRope {
    const float *cos, *sin;  // (positions, N/2), at least kSsdRopeRows; null: no RoPE
    int64 before;
};
static constexpr int64 kSsdRopeRows = 65;

// What forward and backward read; rows of sc, sb and sx are n.ld apart.
template <class A>
struct SsdInput {
    const A *sc, *sb, *sx;
    const float *dt, *dA;
    SsdRope rope;
    SsdShape n;
};

static constexpr int kSsdWarps = 8, kSsdThreads = 256, kChunk = 64;  // kChunk: the longest

struct SsdTiles {
    int q, N, P;        // chunk length, padded N, padded P
    bool fast = false;  // whether this GPU takes the kernels of 7d for this type and shape
    int units() const { return P / 16 * (N / 32); }
};

// A chunk's vectors, of its dt and dA, with cs_t inclusive: from_in = exp(cs_t), to_end = exp(cs_last - cs_t), into =
// to_end dt. log2_cs: log2(e) cs_t; log2_from: log2(dt_s) - log2_cs_s, so that
// decay(t,s) dt_s = 2^(log2_cs_t + log2_from_s).
struct SsdVectors {
    float log2_cs[kChunk], log2_from[kChunk], step[kChunk], from_in[kChunk], to_end[kChunk], into[kChunk];
};
// Shared memory of the sweeps, in bytes.
template <class A>
static size_t ssd_shared(const SsdTiles& t, bool backward) {
    const size_t pad = size_t(kTilePad<A>), q = size_t(t.q), N = size_t(t.N), P = size_t(t.P);
    const size_t tiles = 2 * q * (N + pad) + 2 * q * (P + pad) + (backward ? 2 : 1) * (P * (N + pad) + q * (q + pad));
    const size_t dots = backward ? (2 * (N / 32) + P / 32) * q + 16 : 0;
    return sizeof(A) * tiles + sizeof(SsdVectors) + sizeof(float) * dots;
}
// Shared memory of the fast form: what the greater of its kernels needs.
static size_t ssd_fast_shared(int64 N);
// The longest chunk whose tiles fit. The same for forward and backward: both index chunk_states.
template <class A>
static SsdTiles ssd_tiles(int64 N, int64 P) {
    const size_t limit = 227 * 1024;  // what a block of compute capability 9.0 may have
    const size_t most = size_t(shared_memory_per_block());
    for (const int q : {64, 32}) {
        if (N > 512 || P > 512) break;
        const bool usual = !std::is_same<A, float>::value && P == 64 && (N == 64 || N == 128);
        const SsdTiles t{q, int(round_up(N, 32)), int(round_up(P, 32)), usual && ssd_fast_shared(N) <= most};
        if (t.units() <= 8 * kSsdWarps &&
            std::max(ssd_shared<A>(t, true), ssd_shared<A>(t, false)) <= std::min(limit, most))
            return t;
    }
    fail("SSD: a state of P %lld x N %lld per head is too large for this GPU's on-chip memory (%d KB) in %s",
         (long long)P, (long long)N, int(most / 1024), sizeof(A) == 2 ? "bf16" : "fp32");
}
static int64 ssd_chunks(const SsdTiles& t, int64 T) { return ceil_div(T, t.q); }

__device__ inline void turn(float& a, float& b, float c, float s) {
    const float before = a;
    a = before * c - b * s;
    b = b * c + before * s;
}
// RoPE on a tile's first `rows` rows of N numbers, the first of which stands at `position`. All threads of the block.
template <class A>
__device__ inline void rotate_tile(A* tile, int ld, const SsdRope& rope, int64 position, int rows, int N) {
    const int half = N / 2;
    for (int i = int(threadIdx.x); i < rows * half; i += int(blockDim.x)) {
        const int r = i / half, j = i % half;
        float a = to_float(tile[r * ld + j]), b = to_float(tile[r * ld + j + half]);
        turn(a, b, rope.cos[(position + r) * half + j], rope.sin[(position + r) * half + j]);
        tile[r * ld + j] = from_float<A>(a);
        tile[r * ld + j + half] = from_float<A>(b);
    }
}

// One warp: dt and dA of a chunk, then the vectors. The loads are begun early and used late.
struct SsdSteps {
    float dt[2], dA[2];
    template <class A>
    __device__ void load(const SsdInput<A>& in, int64 row, int64 h, int valid) {
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int64 t = lane_id() + 32 * k, at = (row + t) * in.n.H + h;
            dt[k] = t < valid ? in.dt[at] : 0.0f;
            dA[k] = t < valid ? in.dA[at] : 0.0f;
        }
    }
    __device__ void write(SsdVectors& v) const {
        float cs[2], before = 0;
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            cs[k] = dA[k] * kLog2e;
#pragma unroll
            for (int d = 1; d < 32; d *= 2) {
                const float left = __shfl_up_sync(~0u, cs[k], d);
                if (lane_id() >= d) cs[k] += left;
            }
            cs[k] += before;
            before = __shfl_sync(~0u, cs[k], 31);
        }
#pragma unroll
        for (int k = 0; k < 2; ++k) {
            const int t = lane_id() + 32 * k;
            const float to_end = exp2f(before - cs[k]);
            v.log2_cs[t] = cs[k];
            v.log2_from[t] = log2f(dt[k]) - cs[k];
            v.step[t] = dt[k];
            v.from_in[t] = exp2f(cs[k]);
            v.to_end[t] = to_end;
            v.into[t] = to_end * dt[k];
        }
    }
};
// decay(t,s): subtract, mask, then exp
__device__ inline float chunk_decay(const SsdVectors& v, int t, int s) {
    return s <= t ? exp2_fast(v.log2_cs[t] - v.log2_cs[s]) : 0.0f;
}

// Calls f(row, column, value, the next column's value) for each pair of neighbours that this thread has.
template <int NT, class F>
__device__ inline void each_pair(Accumulator<NT>& acc, F f) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
        for (int t = 0; t < NT; ++t) f(acc_row() + 8 * h, 8 * t + acc_col(), acc.v[t][2 * h], acc.v[t][2 * h + 1]);
}
// A warp's units of the state, in the accumulators of its threads, and the state in memory: as an operand in shared
// memory (tile), and as a matrix (real_P, real_N).
template <class A, int SU>
struct SsdState {
    Accumulator<4> unit[SU];
    A* tile;
    int ld, units, strips, real_P, real_N;
    __device__ SsdState(A* tile_, const SsdTiles& t, const SsdShape& n)
        : tile(tile_),
          ld(t.N + kTilePad<A>),
          units(t.P / 16 * (t.N / 32)),
          strips(t.P / 16),
          real_P(int(n.P)),
          real_N(int(n.N)) {}
    // Calls f(whether it is one of the matrix, its element there, its place in the tile, value 0, value 1) for each pair
    // of neighbours that this thread has.
    template <class F>
    __device__ void for_pairs(F f) {
#pragma unroll
        for (int i = 0; i < SU; ++i) {
            const int u = int(threadIdx.x) / 32 + kSsdWarps * i;
            if (u < units)
                each_pair(unit[i], [&](int r, int c, float& s0, float& s1) {
                    const int p = u % strips * 16 + r, k = u / strips * 32 + c;
                    f(p < real_P && k < real_N, p * real_N + k, p * ld + k, s0, s1);
                });
        }
    }
    __device__ void begin(const float* from) {  // null: zero
        for_pairs([&](bool inside, int at, int tile_at, float& s0, float& s1) {
            s0 = from && inside ? from[at] : 0.0f;
            s1 = from && inside ? from[at + 1] : 0.0f;
            store2(tile + tile_at, s0, s1);
        });
    }
    template <class B>
    __device__ void write(B* to) {
        for_pairs([&](bool inside, int at, int, float& s0, float& s1) {
            if (inside) store2(to + at, s0, s1);
        });
    }
    // state = all state + left^T right, of tiles of q tokens
    __device__ void update(float all, const A* left, int ld_left, const A* right, int q) {
#pragma unroll
        for (int i = 0; i < SU; ++i) {
            const int u = int(threadIdx.x) / 32 + kSsdWarps * i;
            if (u >= units) continue;
            unit[i].scale_rows(all, all);
            multiply<Layout::transposed, Layout::plain>(unit[i], left + u % strips * 16, ld_left,
                                                        right + u / strips * 32, ld, q);
        }
        for_pairs([&](bool, int, int tile_at, float& s0, float& s1) { store2(tile + tile_at, s0, s1); });
    }
};

// Writes an output unit of 16 rows and 32 columns to a matrix with rows `ld` apart.
template <class A>
__device__ inline void write_unit(A* to, int64 ld, Accumulator<4>& acc, int row, int col, int valid, int width) {
    each_pair(acc, [&](int r, int c, float a, float b) {
        if (row + r < valid && col + c < width) store2(to + (row + r) * ld + col + c, a, b);
    });
}
// x_t *= f_t, columns of P numbers. All threads.
template <class A>
__device__ inline void scale_tokens(A* x, int ld, const float* f, int q, int P) {
    for (int i = 2 * int(threadIdx.x); i < q * P; i += 2 * kSsdThreads) {
        const int t = i / P, p = i % P;
        float v[2];
        load<2>(v, x + t * ld + p);
        store2(x + t * ld + p, f[t] * v[0], f[t] * v[1]);
    }
}

// The steps of one chunk, in the letters of docs/ssd.md:
//     G   = M o C B^T dt              (q,q)      rows in strips of 16, columns in groups of 32; nothing above the diagonal
//     Y   = from_in S_in C + G X      (q,P)
//     S   = exp(cs_last) S + (to_end dt X)^T B   (P,N)
template <class A, int SU>
__global__ void __launch_bounds__(kSsdThreads, 1)
    ssd_forward_kernel(A* Y, float* S_T, A* chunk_states, const float* S_0, SsdInput<A> in, SsdTiles tiles) {
    const SsdShape& n = in.n;
    const int q = tiles.q, N = tiles.N, P = tiles.P;  // of the tiles
    const int real_N = int(n.N), real_P = int(n.P);   // of the matrices
    const int ldn = N + kTilePad<A>, ldp = P + kTilePad<A>, ldq = q + kTilePad<A>;
    extern __shared__ __align__(16) unsigned char shared[];
    A* C = reinterpret_cast<A*>(shared);  // (q,N)
    A* Bt = C + q * ldn;                  // (q,N)
    A* X = Bt + q * ldn;                  // (q,P)
    A* Xs = X + q * ldp;                  // (q,P) to_end dt X
    A* S = Xs + q * ldp;                  // (P,N) the state as an operand
    A* G = S + P * ldn;                   // (q,q)
    SsdVectors& v = *reinterpret_cast<SsdVectors*>(G + q * ldq);

    const int warp = int(threadIdx.x) / 32;
    const int64 bh = blockIdx.x, b = bh / n.H, h = bh % n.H, PN = int64(real_P) * real_N, chunks = (n.T + q - 1) / q;
    SsdState<A, SU> state(S, tiles, n);
    state.begin(S_0 ? S_0 + bh * PN : nullptr);
    for (int64 chunk = 0; chunk < chunks; ++chunk) {
        const int64 t0 = chunk * q, row0 = b * n.T + t0;
        const int valid = int(min(int64(q), n.T - t0));
        load_tile(C, ldn, in.sc + row0 * n.ld + h * real_N, n.ld, valid, q, real_N, N);
        load_tile(Bt, ldn, in.sb + row0 * n.ld + h * real_N, n.ld, valid, q, real_N, N);
        load_tile(X, ldp, in.sx + row0 * n.ld + h * real_P, n.ld, valid, q, real_P, P);
        load_tile(Xs, ldp, in.sx + row0 * n.ld + h * real_P, n.ld, valid, q, real_P, P);
        if (warp == 0) {
            SsdSteps steps;
            steps.load(in, row0, h, valid);
            steps.write(v);
        }
        if (chunk_states) state.write(chunk_states + ((b * chunks + chunk) * n.H + h) * PN);
        copies_done();
        __syncthreads();  // tiles, vectors and the state operand are complete
        if (in.rope.cos) {
            rotate_tile(C, ldn, in.rope, in.rope.before + t0, valid, real_N);
            rotate_tile(Bt, ldn, in.rope, in.rope.before + t0, valid, real_N);
        }
        scale_tokens(Xs, ldp, v.into, q, P);
        __syncthreads();  // C and B are turned, Xs is complete
        for (int u = warp; u < q / 16 * (q / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32;
            if (col > row) continue;  // wholly above the diagonal (row and col are not read there)
            Accumulator<4> g;
            g.zero();
            multiply<Layout::plain, Layout::transposed>(g, C + row * ldn, ldn, Bt + col * ldn, ldn, N);
            each_pair(g, [&](int r, int c, float g0, float g1) {
                const int t = row + r, s = col + c;
                store2(G + t * ldq + s, chunk_decay(v, t, s) * g0 * v.step[s],
                       chunk_decay(v, t, s + 1) * g1 * v.step[s + 1]);
            });
        }
        __syncthreads();  // G is complete
        for (int u = warp; u < q / 16 * (P / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32;
            Accumulator<4> y;
            y.zero();
            multiply<Layout::plain, Layout::transposed>(y, C + row * ldn, ldn, S + col * ldn, ldn, N);
            y.scale_rows(v.from_in[row + acc_row()], v.from_in[row + acc_row() + 8]);
            multiply<Layout::plain, Layout::plain>(y, G + row * ldq, ldq, X + col, ldp, row + 16);
            write_unit(Y + (row0 * n.H + h) * real_P, n.H * real_P, y, row, col, valid, real_P);
        }
        __syncthreads();  // the state operand has been read
        state.update(v.from_in[q - 1], Xs, ldp, Bt, q);
        __syncthreads();  // all tiles and vectors have been read
    }
    if (S_T) state.write(S_T + bh * PN);
}

// Sums of rows lane/4 and lane/4 + 8 of a warp's 16, from the 4 threads that share them.
__device__ inline void put_sums(float* to, const float (&s)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
        const float sum = quad_sum(s[h]);
        if (lane_id() % 4 == 0) to[acc_row() + 8 * h] = sum;
    }
}
// One warp: put(u, ddA_u) for the q tokens of a chunk, ddA_u = <S_out, dS> + sum_{t>=u} dcs(t). parts: eight, of the
// first term.
template <class F, class G>
__device__ inline void log_decay_gradient(int q, const float* parts, F dcs, G put) {
    float later = 0;
    for (int w = 0; w < kSsdWarps; ++w) later += parts[w];
    for (int first = q - 32; first >= 0; first -= 32) {
        float sum = dcs(first + lane_id());
        for (int d = 1; d < 32; d *= 2) {
            const float right = __shfl_down_sync(~0u, sum, d);
            if (lane_id() + d < 32) sum += right;
        }
        sum += later;
        later = __shfl_sync(~0u, sum, 0);
        put(first + lane_id(), sum);
    }
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
// several units: each writes its own part, and they are added up in order. A unit does not hold both numbers of a
// pair: dC and dB are left as gradients of the turned C and B, and the kernel of section 5 turns them back.
template <class A, int SU>
__global__ void __launch_bounds__(kSsdThreads, 1)
    ssd_backward_kernel(A* dsc, A* dsb, A* dsx, float* ddt, float* ddA, float* dS_0, const A* dY, const float* dS_T,
                        const A* chunk_states, SsdInput<A> in, SsdTiles tiles) {
    const SsdShape& n = in.n;
    const int q = tiles.q, N = tiles.N, P = tiles.P;  // of the tiles
    const int real_N = int(n.N), real_P = int(n.P);   // of the matrices
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
    SsdVectors& v = *reinterpret_cast<SsdVectors*>(ME + q * ldq);
    float* C_dC = reinterpret_cast<float*>(&v + 1);  // (N/32, q) parts of C_t . dC_t
    float* B_dB = C_dC + N / 32 * q;                 // (N/32, q)
    float* X_dXd = B_dB + N / 32 * q;                // (P/32, q)
    float* S_dot_dS = X_dXd + P / 32 * q;            // (8) parts of <S_out, dS>, one per warp

    const int warp = int(threadIdx.x) / 32;
    const int64 bh = blockIdx.x, b = bh / n.H, h = bh % n.H, PN = int64(real_P) * real_N, chunks = (n.T + q - 1) / q;
    SsdState<A, SU> state(dS, tiles, n);
    // Row sums of an output unit times the tile it belongs to, over the unit's 32 columns, into part[row].
    const auto row_dots = [&](float* part, Accumulator<4>& acc, const A* tile, int ld, int row, int col) {
        float s[2] = {0, 0};
        each_pair(acc, [&](int r, int c, float a, float b) {
            float f[2];
            load<2>(f, tile + (row + r) * ld + col + c);
            s[r / 8] += a * f[0] + b * f[1];
        });
        put_sums(part + row, s);
    };
    state.begin(dS_T ? dS_T + bh * PN : nullptr);
    for (int64 chunk = chunks - 1; chunk >= 0; --chunk) {
        const int64 t0 = chunk * q, row0 = b * n.T + t0;
        const int valid = int(min(int64(q), n.T - t0));
        const int64 c0 = row0 * n.ld + h * real_N, x0 = row0 * n.ld + h * real_P;
        load_tile(C, ldn, in.sc + c0, n.ld, valid, q, real_N, N);
        load_tile(Bt, ldn, in.sb + c0, n.ld, valid, q, real_N, N);
        load_tile(X, ldp, in.sx + x0, n.ld, valid, q, real_P, P);
        load_tile(dy, ldp, dY + (row0 * n.H + h) * real_P, n.H * real_P, valid, q, real_P, P);
        if (warp == 0) {
            SsdSteps steps;
            steps.load(in, row0, h, valid);
            steps.write(v);
        }
        float from_in_dot = 0, new_dot = 0;  // this thread's parts of <S_in, dS> and of the sum over B_s . dB_s
        state.for_pairs([&](bool inside, int at, int tile_at, float& s0, float& s1) {
            float s[2] = {0, 0};
            if (inside) load<2>(s, chunk_states + ((b * chunks + chunk) * n.H + h) * PN + at);
            from_in_dot += s[0] * s0 + s[1] * s1;
            store2(S + tile_at, s[0], s[1]);
        });
        copies_done();
        __syncthreads();  // tiles, vectors, S and dS are complete
        if (in.rope.cos) {
            const int64 position = in.rope.before + t0;
            rotate_tile(C, ldn, in.rope, position, valid, real_N);
            rotate_tile(Bt, ldn, in.rope, position, valid, real_N);
            __syncthreads();  // C and B are turned
        }
        for (int u = warp; u < q / 16 * (q / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32;
            Accumulator<4> g, e;
            g.zero();
            e.zero();
            if (col <= row + 15) {
                multiply<Layout::plain, Layout::transposed>(g, C + row * ldn, ldn, Bt + col * ldn, ldn, N);
                multiply<Layout::plain, Layout::transposed>(e, dy + row * ldp, ldp, X + col * ldp, ldp, P);
            }
            each_pair(g, [&](int r, int c, float g0, float g1) {
                const int t = row + r, s = col + c;
                store2(MG + t * ldq + s, chunk_decay(v, t, s) * g0, chunk_decay(v, t, s + 1) * g1);
            });
            each_pair(e, [&](int r, int c, float e0, float e1) {
                const int t = row + r, s = col + c;
                store2(ME + t * ldq + s, chunk_decay(v, t, s) * e0 * v.step[s],
                       chunk_decay(v, t, s + 1) * e1 * v.step[s + 1]);
            });
        }
        __syncthreads();  // MG and ME are complete
        // The rows of an output strip meet rows t >= row of MG and ME (transposed products) or columns s <= row +
        // 15.
        for (int u = warp; u < q / 16 * (N / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32, r0 = row + acc_row(), r1 = r0 + 8;
            Accumulator<4> acc;
            acc.zero();  // dB
            multiply<Layout::plain, Layout::plain>(acc, X + row * ldp, ldp, dS + col, ldn, P);
            acc.scale_rows(v.into[r0], v.into[r1]);
            each_pair(acc, [&](int r, int c, float a, float b) {
                float f[2];
                load<2>(f, Bt + (row + r) * ldn + col + c);
                new_dot += a * f[0] + b * f[1];
            });
            multiply<Layout::transposed, Layout::plain>(acc, ME + row * ldq + row, ldq, C + row * ldn + col, ldn,
                                                        q - row);
            row_dots(B_dB + col / 32 * q, acc, Bt, ldn, row, col);
            write_unit(dsb + c0, n.ld, acc, row, col, valid, real_N);
            acc.zero();  // dC
            multiply<Layout::plain, Layout::plain>(acc, dy + row * ldp, ldp, S + col, ldn, P);
            acc.scale_rows(v.from_in[r0], v.from_in[r1]);
            multiply<Layout::plain, Layout::plain>(acc, ME + row * ldq, ldq, Bt + col, ldn, row + 16);
            row_dots(C_dC + col / 32 * q, acc, C, ldn, row, col);
            write_unit(dsc + c0, n.ld, acc, row, col, valid, real_N);
        }
        for (int u = warp; u < q / 16 * (P / 32); u += kSsdWarps) {
            const int row = u % (q / 16) * 16, col = u / (q / 16) * 32, r0 = row + acc_row(), r1 = r0 + 8;
            Accumulator<4> acc;
            acc.zero();  // dXd
            multiply<Layout::plain, Layout::transposed>(acc, Bt + row * ldn, ldn, dS + col * ldn, ldn, N);
            acc.scale_rows(v.to_end[r0], v.to_end[r1]);
            multiply<Layout::transposed, Layout::plain>(acc, MG + row * ldq + row, ldq, dy + row * ldp + col, ldp,
                                                        q - row);
            row_dots(X_dXd + col / 32 * q, acc, X, ldp, row, col);
            acc.scale_rows(v.step[r0], v.step[r1]);
            write_unit(dsx + x0, n.ld, acc, row, col, valid, real_P);
        }
        const float part = warp_sum(v.from_in[q - 1] * from_in_dot + new_dot);
        if (lane_id() == 0) S_dot_dS[warp] = part;
        __syncthreads();  // dS, S and dy have been read, the dot products are complete
        if (warp == 0)
            log_decay_gradient(
                q, S_dot_dS,
                [&](int t) {
                    float dcs = 0;
                    for (int i = 0; i < N / 32; ++i) dcs += C_dC[i * q + t] - B_dB[i * q + t];
                    return dcs;
                },
                [&](int t, float sum) {
                    float xdx = 0;
                    for (int i = 0; i < P / 32; ++i) xdx += X_dXd[i * q + t];
                    if (t < valid) {
                        ddt[(row0 + t) * n.H + h] = xdx;
                        ddA[(row0 + t) * n.H + h] = sum;
                    }
                });
        scale_tokens(dy, ldp, v.from_in, q, P);  // from_in dY, in place
        __syncthreads();                         // it is complete
        state.update(v.from_in[q - 1], dy, ldp, C, q);
        __syncthreads();  // all tiles and vectors have been read
    }
    if (dS_0) state.write(dS_0 + bh * PN);
}
// ---- 7d  Chunked, for bf16 with P = 64 and N = 64 or 128 --------------------------------------------------------------
// The same equations as 7c, arranged so that the chip is never without work. One block per multiprocessor; all of a
// chunk's work lies between two barriers: tiles, the state as an operand and the vectors exist twice or three times, and
// during a chunk the tiles of those that follow arrive and are turned (RoPE). No q x q matrix goes through shared memory:
// a warp's 16 rows of G leave one product in its accumulators and enter the next as its left operand (Rows). Warps have
// roles, so that their different work overlaps:
//
//     warps 0-3     16 tokens each, as rows of the (q,q) matrices that are summed over later (forward: earlier) tokens
//     warps 4-7     16 rows of the state each, in fp32 accumulators; in the backward also the rows of dC
//     warps 8-11    of the forward: bring the tiles and turn B (warps 0-3 turn C, in registers; the backward's bring and
//                   turn all together)
//
// The forward's products are those of section 6a, by wgmma or mma.sync (team).
//
// ROPE. Products of C and B see differences of positions only. So positions are counted from the chunk's first token,
// and the angles are the same for all chunks: a table of q rows in shared memory. The state turns along: it is kept
// as S_local, its rows turned back by the angle of the chunk's first position, and turned by q positions more from chunk
// to chunk. States that enter or leave (S_0, S_T and `borders`) are turned to position 0's frame, chunk_states stay
// local.
//
// EQUAL SHARES (SsdCut). Neighbouring heads of a sequence go abreast, each in a block of its own: what their blocks read
// at a time lies together in memory. The chunks of all such groups, one group after the other, each in the order of the
// sweep, are cut into equal ranges. A block goes through the groups of its range from the last to the first: it brings its
// pair of a group as far as its range goes and leaves the state in `borders` for the block of the next range, which comes
// to the rest of that pair at its end. With at least as many groups as ranges the state is there by then (chained: a flag
// per warp tells; all blocks run at once, launched cooperatively). With fewer, ssd_states_kernel has made the states at
// all borders before.
//
// Per chunk and head at N 128: reads 42 KB, writes Y 8 KB and S_in 16 KB (bf16); 4.2 M operations. Backward: reads
// 66 KB, writes 41 KB, 9 M operations.

static constexpr int kFastP = 64, kForwardThreads = 384;

// What is known of a chunk's ddt and ddA: row sums, and parts of <S_out, dS>.
struct SsdDots {
    float C_dC[kChunk], B_dB[kChunk], X_dXd[kChunk], S_dS[8];
};
// The cosines and sines of the positions 0 .. q.
template <int N>
struct SsdAngles {
    static constexpr int half = N / 2, ld = half + 8;
    float cos[(kChunk + 1) * ld], sin[(kChunk + 1) * ld];
    // Where angle j of a row is: groups of 4, the even ones first, so that neither of the two ways to read them (8
    // neighbours per thread, or as accumulators lie) meets a bank twice.
    static __device__ unsigned at(unsigned row, unsigned j) {
        return row * ld + j / 8 * 4 + j / 4 % 2 * (half / 2 + 4) + j % 4;
    }
    __device__ void get(int row, int j, float (&c)[2], float (&s)[2]) const {  // of j and j + 1
        load<2>(c, cos + at(row, j));
        load<2>(s, sin + at(row, j));
    }
    __device__ void fill(const SsdRope& rope) {  // no turn at all without RoPE
        for (int i = int(threadIdx.x); i < (kChunk + 1) * half; i += int(blockDim.x)) {
            cos[at(i / half, i % half)] = rope.cos ? rope.cos[i] : 1.0f;
            sin[at(i / half, i % half)] = rope.cos ? rope.sin[i] : 0.0f;
        }
    }
};
// Tiles (q,N), also (P,N), and (q,P).
template <int N, int team>
using SsdWide = Tile<bf16, kChunk, N, team>;
template <int team>
using SsdNarrow = Tile<bf16, kChunk, kFastP, team>;
// Where an element lies: Tile::at without signs, of which the compiler would make much.
template <int kCols>
__device__ inline unsigned spot(Tile<bf16, kChunk, kCols, 1> t, unsigned r, unsigned c) {
    return r * t.ld + c;
}
template <int kCols>
__device__ inline unsigned spot(Tile<bf16, kChunk, kCols, 4> t, unsigned r, unsigned c) {
    return c / 64 * t.panel + r * t.ld + ((c / 8 ^ r) % 8 * 8 | c % 8);
}
// Shared memory of the three kernels; the first is what all have.
template <int N, int team, int kStages>
struct SsdShared {
    static constexpr int stages = kStages;
    alignas(1024) bf16 B[kStages][SsdWide<N, team>::size];
    alignas(1024) bf16 X[kStages][SsdNarrow<team>::size];
    SsdAngles<N> angles;
    SsdVectors vectors[2];
};
template <int N, int team>
struct SsdForwardShared : SsdShared<N, team, 3> {
    alignas(1024) bf16 C[3][SsdWide<N, team>::size];
    alignas(1024) bf16 S[2][SsdWide<N, team>::size];  // the state as an operand
};
template <int N>
struct SsdBackwardShared : SsdShared<N, 1, 2> {
    bf16 C[2][SsdWide<N, 1>::size], dY[2][SsdNarrow<1>::size], S[2][SsdWide<N, 1>::size];  // S: S_in
    bf16 dS[2][SsdWide<N, 1>::size];
    SsdDots dots[2];
};
static size_t ssd_fast_shared(int64 N) {
    return N == 128 ? std::max(sizeof(SsdBackwardShared<128>), sizeof(SsdForwardShared<128, 1>))
                    : std::max(sizeof(SsdBackwardShared<64>), sizeof(SsdForwardShared<64, 1>));
}

struct SsdCut {
    int H, T, chunks, abreast, groups, ranges;
    // A state at a border comes from the block that was there before, or (few) all are known.
    __host__ __device__ bool few() const { return groups < ranges; }
    __host__ __device__ bool chained() const { return !few() && groups % ranges != 0; }
    __host__ __device__ int pairs() const { return groups * abreast; }
    int blocks() const { return ranges * abreast; }  // each has a place in `borders`, for the state that it begins with
    __device__ int64 range(int i, int of) const { return int64(groups) * chunks * i / of; }
};
// A chunk of a block's work, in the order of the sweep: `step` of `pair`, before `end`, where the block's part of the pair
// ends. row: the chunk's first token among those of all sequences.
template <bool kReverse>
struct SsdPlace {
    int64 row;
    int group, last, pair, h, step, end, chunk;                   // last: the group to end with
    __device__ static int64 border(const SsdCut& n, int after) {  // where the block's range begins, or (1) ends
        return n.range(int(blockIdx.x) / n.abreast + after, int(gridDim.x) / n.abreast);
    }
    __device__ SsdPlace(const SsdCut& n) : last(int(border(n, 0) / n.chunks)) {
        begin(n, int((border(n, 1) - 1) / n.chunks));
    }
    __device__ void begin(const SsdCut& n, int g) {
        group = g;
        pair = g * n.abreast + int(blockIdx.x) % n.abreast;
        h = pair % n.H;
        step = int(max(border(n, 0) - int64(g) * n.chunks, int64(0)));
        end = int(min(border(n, 1) - int64(g) * n.chunks, int64(n.chunks)));
        chunk = kReverse ? n.chunks - 1 - step : step;
        row = pair / n.H * int64(n.T) + time();
    }
    __device__ int time() const { return chunk * kChunk; }
    __device__ int valid(const SsdCut& n) const { return min(kChunk, n.T - time()); }
    __device__ int64 chunk_state(const SsdCut& n) const { return (int64(pair / n.H) * n.chunks + chunk) * n.H + h; }
    __device__ bool at_end() const { return step + 1 == end; }
    __device__ bool next(const SsdCut& n) {
        if (at_end()) {
            if (group == last) return false;
            begin(n, group - 1);
        } else {
            ++step;
            chunk += kReverse ? -1 : 1;
            row += kReverse ? -kChunk : kChunk;
        }
        return true;
    }
};

// The same number, but the compiler does not know that it stays the same from chunk to chunk: addresses made from it are
// made anew, where keeping them all would take more registers than there are.
__device__ inline int fresh(int x) {
    asm volatile("" : "+r"(x));
    __builtin_assume(x >= 0);
    return x;
}
// As copy16, but the whole 256 bytes around come to the L2 cache: neighbouring heads want them.
__device__ inline void copy16_for_all_heads(bf16* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(inside ? 16 : 0)
                 : "memory");
}
// Loops over the rows of a tile are rolled, since less code is faster, except in a forward that stores no states.
// Copies a (q, kCols) tile, rows past `valid` become zero. A thread brings 16 bytes of the left half and those of the right
// half that RoPE pairs them with, so that it can turn what it has copied without a barrier between.
template <int kThreads, bool rolled = true, int kCols, int team>
__device__ inline void fetch_tile(int thread, Tile<bf16, kChunk, kCols, team> to, bf16* tile, const bf16* from,
                                  int64 ld, int valid) {
    constexpr unsigned half = kCols / 2, per_row = kCols / 16, rows = kThreads / per_row;
    const unsigned i = unsigned(fresh(thread)), r0 = i / per_row, stride = unsigned(ld) * 2;
    const unsigned j = i % per_row * 8 + (kCols == 64 ? r0 % 2 * half : 0);  // other banks for odd rows
    const char* left = reinterpret_cast<const char*>(from + j);
    const char* right = reinterpret_cast<const char*>(from + (j ^ half));
#pragma unroll(rolled ? 1 : kChunk)
    for (unsigned r = r0, k = 0; k < kChunk / rows; ++k, r += rows) {
        const unsigned row = min(r, unsigned(valid) - 1);  // what is not read is none the less a place that there is
        copy16_for_all_heads(tile + spot(to, r, j), left + uint64_t(row) * stride, row == r);
        copy16_for_all_heads(tile + spot(to, r, j ^ half), right + uint64_t(row) * stride, row == r);
    }
}
// Turns what this thread has fetched of one or two tiles.
template <int kThreads, bool rolled = true, int N, int team, class... Tiles>
__device__ inline void rotate_fetched(int thread, const SsdAngles<N>& angles, SsdWide<N, team> at, Tiles... tiles) {
    constexpr int per_row = N / 16, rows = kThreads / per_row;
    const unsigned i = unsigned(fresh(thread)), j = i % per_row * 8;
#pragma unroll(rolled ? 1 : kChunk)
    for (int k = 0; k < kChunk / rows; ++k) {
        const unsigned r = i / per_row + unsigned(k * rows);
        float c[2][4], s[2][4];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            load<4>(c[h], angles.cos + angles.at(r, j + 4 * h));
            load<4>(s[h], angles.sin + angles.at(r, j + 4 * h));
        }
        const auto turn_pieces = [&](bf16* lo, bf16* hi) {
            float a[8], b[8];
            load<8>(a, lo);
            load<8>(b, hi);
#pragma unroll
            for (int l = 0; l < 8; ++l) turn(a[l], b[l], c[l / 4][l % 4], s[l / 4][l % 4]);
            store<8>(lo, a);
            store<8>(hi, b);
        };
        (turn_pieces(tiles + spot(at, r, j), tiles + spot(at, r, j + N / 2)), ...);
    }
}
// Turns 16 rows of tokens, from `row` on.
template <int N>
__device__ inline void rotate_rows(Rows<bf16, N>& x, const SsdAngles<N>& angles, int row) {
#pragma unroll
    for (int k = 0; k < N / 32; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            uint32_t &lo = x.r[k][i], &hi = x.r[k + N / 32][i];
            float c[2], s[2];
            angles.get(row + acc_row() + i % 2 * 8, 16 * k + i / 2 * 8 + acc_col(), c, s);
            float a[2] = {low_half(lo), high_half(lo)}, b[2] = {low_half(hi), high_half(hi)};
            turn(a[0], b[0], c[0], s[0]);
            turn(a[1], b[1], c[1], s[1]);
            lo = pack(a[0], a[1]);
            hi = pack(b[0], b[1]);
        }
}
// Turns the rows of an accumulator: v[j], v[j + N/2] by angle j. f(h, j, c, s) gives the cosines and sines of j and
// j + 1 for the row lane/4 + 8 h.
template <int NT, class F>
__device__ inline void rotate_rows(Accumulator<NT>& v, float sign, F f) {
#pragma unroll
    for (int t = 0; t < NT / 2; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            float c[2], s[2];
            f(h, 8 * t + acc_col(), c, s);
#pragma unroll
            for (int i = 0; i < 2; ++i) turn(v.v[t][2 * h + i], v.v[t + NT / 2][2 * h + i], c[i], sign * s[i]);
        }
}
// The same by q positions, for all rows: from a chunk's frame to the next one's, or back.
template <int N>
__device__ inline void rotate_frame(Accumulator<N / 8>& v, float sign, const SsdAngles<N>& angles) {
    rotate_rows(v, sign, [&](int, int j, float(&c)[2], float(&s)[2]) { angles.get(kChunk, j, c, s); });
}
// Sums over the columns of acc o rows: s[0] of row lane/4, s[1] of row lane/4 + 8, this thread's part.
template <int NT>
__device__ inline void row_dots(float (&s)[2], const Accumulator<NT>& acc, const Rows<bf16, 8 * NT>& rows) {
    float odd[2] = {0, 0};
    s[0] = s[1] = 0;
#pragma unroll
    for (int k = 0; k < NT / 2; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float* v = &acc.v[2 * k + i / 2][i % 2 * 2];
            s[i % 2] += v[0] * __uint_as_float(rows.r[k][i] << 16);
            odd[i % 2] += v[1] * __uint_as_float(rows.r[k][i] & 0xFFFF0000u);
        }
    s[0] += odd[0];
    s[1] += odd[1];
}
// 16 rows of a tile.
template <int K, int team>
__device__ inline void load_rows(Rows<bf16, K>& a, Tile<bf16, kChunk, K, team> at, const bf16* tile, int row) {
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
        load_matrices<false>(a.r[k], tile + spot(at, row + lane_id() % 16, 16 * k + lane_id() / 16 * 8));
}
// acc = a b, or += if `add`. What was done to acc and a before is done before wgmma begins: the compiler does not see that
// its order matters.
template <Layout lb, int kCols, int K, int NT, int team>
__device__ inline void settled_product(Accumulator<NT> (&acc)[1], Rows<bf16, K> (&a)[1],
                                       Tile<bf16, kChunk, kCols, team> at, const bf16* b, bool add) {
    changes_here(acc);
#pragma unroll
    for (int k = 0; k < K / 16; ++k)
#pragma unroll
        for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[0].r[k][i]));
    product<lb>(acc, a, at, b, add);
}
// 16 rows of (f o x)^T: columns of x, each token scaled by its f.
template <int team>
__device__ inline void load_scaled_transposed(Rows<bf16, kChunk>& a, SsdNarrow<team> at, const bf16* x, int col,
                                              const float* f) {
    const int r = lane_id() % 8, m = lane_id() / 8;
#pragma unroll
    for (int k = 0; k < kChunk / 16; ++k) {
        load_matrices<true>(a.r[k], x + spot(at, 16 * k + r + m / 2 * 8, col + m % 2 * 8));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float w[2];
            load<2>(w, f + 16 * k + i / 2 * 8 + acc_col());
            a.r[k][i] = pack(w[0] * low_half(a.r[k][i]), w[1] * high_half(a.r[k][i]));
        }
    }
}
// Writes 16 rows of an accumulator, rows `ld` apart, those before `valid`.
template <int NT>
__device__ inline void write_rows(bf16* to, int64 ld, Accumulator<NT>& acc, int valid) {
    each_pair(acc, [&](int r, int c, float a, float b) {
        if (r < valid) store2(to + r * ld + c, a, b);
    });
}
// The same into a tile.
template <int N, int team, int NT>
__device__ inline void write_rows(SsdWide<N, team> at, bf16* tile, int row, Accumulator<NT>& acc) {
    each_pair(acc, [&](int r, int c, float a, float b) { store2(tile + spot(at, row + r, c), a, b); });
}
// 16 rows of a tile, their first kCols numbers, into memory: 16 bytes a lane.
template <int kCols, int N, int team>
__device__ inline void store_rows(bf16* to, int64 ld, SsdWide<N, team> at, const bf16* tile, int row, int valid) {
    constexpr int per_row = kCols / 8;
#pragma unroll 2
    for (int i = lane_id(); i < 16 * per_row; i += 32) {
        const int r = i / per_row, c = i % per_row * 8;
        if (r < valid)
            *reinterpret_cast<uint4*>(to + r * ld + c) = *reinterpret_cast<const uint4*>(tile + spot(at, row + r, c));
    }
}
// One warp's 16 rows of a state, as it enters and leaves: fp32, in position 0's frame. What has left is of no more use.
template <int N>
__device__ inline void rotate_to(Accumulator<N / 8>& state, float sign, const SsdRope& rope, int time) {
    const int64 position = rope.before + time;
    if (rope.cos)
        rotate_rows(state, sign, [&](int, int j, float(&c)[2], float(&s)[2]) {
            load<2>(c, rope.cos + position * (N / 2) + j);
            load<2>(s, rope.sin + position * (N / 2) + j);
        });
}
template <int N>
__device__ inline void write_state(float* to, Accumulator<N / 8>& state, int row, const SsdRope& rope, int time) {
    rotate_to<N>(state, 1.0f, rope, time);
    each_pair(state, [&](int r, int c, float a, float b) { store2(to + (row + r) * N + c, a, b); });
}
// All warps of the block, each wherever it is in the program.
__device__ inline void block_barrier() { asm volatile("bar.sync 0;" ::: "memory"); }
// Moves registers between the roles, four warps each: how many a thread has from here on. Only with wgmma's instructions.
template <int team, int count, bool more>
__device__ inline void set_registers() {
    if (team == 4 && more) WGMMA(asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count)));
    if (team == 4 && !more) WGMMA(asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count)));
}
// A warp's note to the warp of the next block that goes on with its rows.
__device__ inline void leave_note(int* flag) {
    __syncwarp();  // all lanes have written
    if (lane_id() == 0) {
        __threadfence();
        asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(1) : "memory");
    }
}
__device__ inline void await_note(const int* flag) {
    int there = 0;
    while (!there) asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(there) : "l"(flag) : "memory");
    __syncwarp();
}
// g (16 rows t from `row` on, columns s from `col` on) times decay(t,s) dt_s
template <int NT>
__device__ inline void weigh(Accumulator<NT>& g, const SsdVectors& v, int row, int col) {
    each_pair(g, [&](int r, int c, float& a, float& b) {
        const int t = row + r, s = col + c;
        float from[2];
        load<2>(from, v.log2_from + s);
        a = s <= t ? exp2_fast(v.log2_cs[t] + from[0]) * a : 0.0f;
        b = s < t ? exp2_fast(v.log2_cs[t] + from[1]) * b : 0.0f;
    });
}
// Where states come from and go to: those of the pairs (S_0 and S_T, or dS_T and dS_0; may be null), and at borders.
struct SsdEnds {
    const float* first;
    float *last, *borders;
    int* flags;  // one per border and warp: it has arrived
};
// A warp's rows of the state at the beginning and the end of a pair's part of a range.
template <int N, bool kReverse>
__device__ inline void enter(Accumulator<N / 8>& state, const SsdPlace<kReverse>& at, const SsdCut& cut,
                             const SsdEnds& ends, int row, const SsdRope& rope) {
    const float* from = ends.first ? ends.first + int64(at.pair) * kFastP * N : nullptr;
    if (at.step > 0) {
        if (cut.chained()) await_note(ends.flags + 4 * int(blockIdx.x) + row / 16);
        from = ends.borders + int64(blockIdx.x) * kFastP * N;
    }
    state.zero();
    if (!from) return;
    each_pair(state, [&](int r, int c, float& a, float& b) {
        a = __ldcg(from + (row + r) * N + c);
        b = __ldcg(from + (row + r) * N + c + 1);
    });
    rotate_to<N>(state, -1.0f, rope, at.time());
}
template <int N, bool kReverse>
__device__ inline void leave(Accumulator<N / 8>& state, const SsdPlace<kReverse>& at, const SsdCut& cut,
                             const SsdEnds& ends, int row, const SsdRope& rope) {
    if (at.end == cut.chunks) {
        if (ends.last) write_state<N>(ends.last + int64(at.pair) * kFastP * N, state, row, rope, at.time());
    } else if (cut.chained()) {
        const int next = int(blockIdx.x) + cut.abreast;
        write_state<N>(ends.borders + int64(next) * kFastP * N, state, row, rope, at.time());
        leave_note(ends.flags + 4 * next + row / 16);
    }
}
// The state at the end of a chunk becomes that of the next one's beginning: the pair's next, or another pair's.
template <int N, bool kReverse>
__device__ inline void hand_over(Accumulator<N / 8>& state, SsdPlace<kReverse> at, const SsdCut& cut,
                                 const SsdEnds& ends, int row, const SsdRope& rope, const SsdAngles<N>& angles) {
    if (at.at_end()) {
        leave<N>(state, at, cut, ends, row, rope);
        if (at.next(cut)) enter<N>(state, at, cut, ends, row, rope);
    } else {
        rotate_frame<N>(state, kReverse ? 1.0f : -1.0f, angles);
    }
}
// A block's way through its range; warps of all roles go it in step, each with its own functions. fetch(place, stage)
// begins to bring tiles, stages - 1 chunks ahead, and arrived(stage) turns them when they are there; work(place, whether
// more follow, stage, turn) is for the chunk itself. One warp (keeps_time) makes the vectors, a chunk ahead.
template <int team, class Shared, class Place, class Fetch, class Arrived, class Work>
__device__ inline void ssd_sweep(Shared& m, const SsdInput<bf16>& in, const SsdCut& cut, Place at, bool keeps_time,
                                 Fetch fetch, Arrived arrived, Work work) {
    constexpr int stages = Shared::stages;
    SsdSteps steps;
    Place next = at;
    bool more = next.next(cut);
    fetch(at, 0);
    copies_commit();
    if (stages == 3 && more) fetch(next, 1);
    copies_commit();
    m.angles.fill(in.rope);
    if (keeps_time) {
        steps.load(in, at.row, at.h, at.valid(cut));
        steps.write(m.vectors[0]);
        if (more) steps.load(in, next.row, next.h, next.valid(cut));
    }
    block_barrier();  // the angles are there
    copies_wait<stages - 2>();
    arrived(0);
    for (int stage = 0, turn = 0;; turn ^= 1) {
        const int after = stage + 1 == stages ? 0 : stage + 1;
        if (team == 4) WGMMA(asm volatile("fence.proxy.async.shared::cta;" ::: "memory"));  // for wgmma to see it, too:
        block_barrier();  // this chunk's tiles, vectors and state are complete, all that is older has been read
        Place ahead = next;
        const bool further = more && ahead.next(cut);
        if (keeps_time && more) {
            steps.write(m.vectors[turn ^ 1]);
            if (further) steps.load(in, ahead.row, ahead.h, ahead.valid(cut));  // it takes long to come
        }
        if (stages == 2 ? more : further) fetch(stages == 2 ? next : ahead, stages == 2 ? after : 3 - stage - after);
        copies_commit();
        work(at, more, stage, turn);
        if (!more) return;
        copies_wait<stages - 2>();
        arrived(after);
        at = next;
        next = ahead;
        more = further;
        stage = after;
    }
}

static constexpr int kSsdParts = 2;  // ranges of ssd_states_kernel per range of the sweep
// What the chunks of a pair in one range add to the state, where the range ends within the pair: states (ranges,P,N) in
// position 0's frame, and the logarithm of what remains of the state before. forward: fn = B, fp = X; reverse: C and dY.
// A few blocks per block of the sweep; warps 0-3 have the rows of the state, 4-7 bring the tiles. 24 KB per chunk.
template <int N, int team, bool kReverse>
__global__ void __launch_bounds__(256, 2) ssd_states_kernel(float* states, float* log_decays, const bf16* fn,
                                                            const bf16* fp, int64 ld_p, SsdInput<bf16> in, SsdCut cut) {
    constexpr int P = kFastP;
    extern __shared__ __align__(1024) unsigned char ssd_memory[];
    using Shared = SsdShared<N, team, 3>;
    Shared& m = *reinterpret_cast<Shared*>(ssd_memory);
    const SsdWide<N, team> wide;
    const SsdNarrow<team> narrow;
    const int thread = int(threadIdx.x) - 128, row = int(threadIdx.x / 32 * 16);
    SsdPlace<kReverse> at(cut);
    const int64 border = cut.range(int(blockIdx.x) / cut.abreast / kSsdParts + 1, cut.ranges);
    if (border >= int64(at.group + 1) * cut.chunks) return;  // none follows in this pair
    at.last = at.group;
    const auto fetch = [&](const auto& p, int stage) {
        fetch_tile<128>(thread, wide, m.B[stage], fn + p.row * in.n.ld + p.h * N, in.n.ld, p.valid(cut));
        fetch_tile<128>(thread, narrow, m.X[stage], fp + p.row * ld_p + p.h * P, ld_p, p.valid(cut));
    };
    const auto arrived = [&](int stage) { rotate_fetched<128>(thread, m.angles, wide, m.B[stage]); };
    const auto none = [](auto&&...) {};
    if (thread >= 0) return ssd_sweep<team>(m, in, cut, at, thread < 32, fetch, arrived, none);
    Accumulator<N / 8> state[1];
    state[0].zero();
    float log_decay = 0;
    ssd_sweep<team>(m, in, cut, at, false, none, none, [&](const auto& here, bool more, int stage, int turn) {
        const SsdVectors& v = m.vectors[turn];
        Rows<bf16, kChunk> x[1];
        load_scaled_transposed(x[0], narrow, m.X[stage], row, kReverse ? v.from_in : v.into);
        const float all = v.from_in[kChunk - 1];
        log_decay += v.log2_cs[kChunk - 1];
        state[0].scale_rows(all, all);
        settled_product<Layout::plain>(state, x, wide, m.B[stage], true);
        products_wait<team, 0>(state);
        if (more) rotate_frame<N>(state[0], kReverse ? 1.0f : -1.0f, m.angles);
        else write_state<N>(states + int64(blockIdx.x) * P * N, state[0], row, in.rope, here.time());
    });
    if (threadIdx.x == 0) log_decays[blockIdx.x] = log_decay * kLn2;
}
// The states at the borders of the ranges from those of the finer ones. One thread per number
// of a pair's state; first: S_0, or dS_T, which is copied to `starts`: it may be overwritten before the last block reads it.
__global__ void pass_states_kernel(float* borders, float* starts, const float* states, const float* log_decays,
                                   const float* first, int64 PN, SsdCut cut) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= cut.pairs() * PN) return;
    const int ranges = cut.ranges * kSsdParts, pair = int(i / PN), lane = pair % cut.abreast;
    const int64 begin = int64(pair / cut.abreast) * cut.chunks, end = begin + cut.chunks;
    float s = starts[i] = first ? first[i] : 0.0f;
    int r = int(begin * ranges / (int64(cut.groups) * cut.chunks));  // the range that the pair begins in
    while (cut.range(r + 1, ranges) <= begin) ++r;
    for (; cut.range(r / kSsdParts + 1, cut.ranges) < end; ++r) {
        const int64 at = int64(r) * cut.abreast + lane;
        s = expf(log_decays[at]) * s + states[at * PN + i % PN];
        if ((r + 1) % kSsdParts == 0) borders[((r + 1) / kSsdParts * int64(cut.abreast) + lane) * PN + i % PN] = s;
    }
}

template <int N, int team, bool states>  // states: whether they are stored
__global__ void __launch_bounds__(kForwardThreads, 1)
    ssd_forward_fast_kernel(bf16* Y, bf16* chunk_states, SsdEnds ends, SsdInput<bf16> in, SsdCut cut) {
    const SsdShape& n = in.n;
    constexpr int P = kFastP, kThreads = 128;  // that bring the tiles: warps 8-11
    extern __shared__ __align__(1024) unsigned char ssd_memory[];
    using Shared = SsdForwardShared<N, team>;
    Shared& m = *reinterpret_cast<Shared*>(ssd_memory);
    const SsdWide<N, team> wide;
    const SsdNarrow<team> narrow;
    const int warp = int(threadIdx.x / 32), row = int(threadIdx.x / 32 % 4 * 16);  // of tokens or of the state
    const int thread = int(threadIdx.x) - 256;
    const SsdPlace<false> first(cut);
    const auto none = [](auto&&...) {};
    if (warp >= 8) {
        set_registers<team, 104, false>();
        const auto fetch = [&](const auto& p, int stage) {
            const int64 at = p.row * n.ld;
            fetch_tile<kThreads, states>(thread, wide, m.C[stage], in.sc + at + p.h * N, n.ld, p.valid(cut));
            fetch_tile<kThreads, states>(thread, wide, m.B[stage], in.sb + at + p.h * N, n.ld, p.valid(cut));
            fetch_tile<kThreads, states>(thread, narrow, m.X[stage], in.sx + at + p.h * P, n.ld, p.valid(cut));
        };
        const auto arrived = [&](int stage) { rotate_fetched<kThreads, states>(thread, m.angles, wide, m.B[stage]); };
        return ssd_sweep<team>(m, in, cut, first, warp == 8, fetch, arrived, none);
    }
    set_registers<team, 200, true>();
    if (warp < 4)
        return ssd_sweep<team>(m, in, cut, first, false, none, none, [&](const auto& at, bool, int stage, int turn) {
            const SsdVectors& v = m.vectors[turn];
            Rows<bf16, N> C[1];
            load_rows(C[0], wide, m.C[stage], row);
            rotate_rows(C[0], m.angles, row);
            Accumulator<8> y[1], g[1];
            settled_product<Layout::transposed>(g, C, wide, m.B[stage], false);
            product<Layout::transposed>(y, C, wide, m.S[turn], false);
            products_wait<team, 1>(g);
            weigh(g[0], v, row, 0);
            Rows<bf16, kChunk> G[1];
            G[0].take(g[0], nullptr);
            products_wait<team, 0>(y);
            y[0].scale_rows(v.from_in[row + acc_row()], v.from_in[row + acc_row() + 8]);
            settled_product<Layout::plain>(y, G, narrow, m.X[stage], true);
            products_wait<team, 0>(y);
            bf16* to = Y + ((at.row + row) * n.H + at.h) * P;
            if (states && N == 128) {
                write_rows(to, n.H * P, y[0], at.valid(cut) - row);
            } else {  // whole rows, by way of the warp's own of C, which it has in registers: up to 6% sooner
                __syncwarp();
                write_rows(wide, m.C[stage], row, y[0]);
                __syncwarp();
                store_rows<P>(to, n.H * P, wide, m.C[stage], row, at.valid(cut) - row);
            }
        });
    Accumulator<N / 8> state[1];
    enter<N>(state[0], first, cut, ends, row, in.rope);
    write_rows(wide, m.S[0], row, state[0]);
    ssd_sweep<team>(m, in, cut, first, false, none, none, [&](const auto& at, bool more, int stage, int turn) {
        const SsdVectors& v = m.vectors[turn];
        Rows<bf16, kChunk> x[1];
        load_scaled_transposed(x[0], narrow, m.X[stage], row, v.into);
        const float all = v.from_in[kChunk - 1];
        state[0].scale_rows(all, all);
        settled_product<Layout::plain>(state, x, wide, m.B[stage], true);
        if (states) store_rows<N>(chunk_states + (at.chunk_state(cut) * P + row) * N, N, wide, m.S[turn], row, 16);
        products_wait<team, 0>(state);
        hand_over<N>(state[0], at, cut, ends, row, in.rope, m.angles);
        if (more) write_rows(wide, m.S[turn ^ 1], row, state[0]);
    });
}

// The backward in the same arrangement; dS goes from the last chunk to the first.
//     warps 0-3, tokens s:  dXd = to_end B dS^T + (M o G)^T dY,  dB = into X dS + (M o E dt)^T C      with G^T = B C^T,
//     warps 4-7, tokens t:  dC = from_in dY S_in + (M o E dt) B                                        E^T = X dY^T
//                           dS_in = exp(cs_last) dS + (from_in dY)^T C
// E is made twice, once as rows t and once as rows s: cheaper than a transposition through shared memory.
template <int N>
__global__ void __launch_bounds__(kSsdThreads, 1)
    ssd_backward_fast_kernel(bf16* dsc, bf16* dsb, bf16* dsx, float* ddt, float* ddA, const bf16* dY,
                             const bf16* chunk_states, SsdEnds ends, SsdInput<bf16> in, SsdCut cut) {
    const SsdShape& n = in.n;
    constexpr int P = kFastP;
    extern __shared__ __align__(1024) unsigned char ssd_memory[];
    SsdBackwardShared<N>& m = *reinterpret_cast<SsdBackwardShared<N>*>(ssd_memory);
    const SsdWide<N, 1> wide;
    const SsdNarrow<1> narrow;
    constexpr int ldn = wide.ld, ldp = narrow.ld;
    const int thread = int(threadIdx.x), warp = int(threadIdx.x / 32);
    const int row = int(threadIdx.x / 32 % 4 * 16);  // of tokens; warps 4-7: also of the state
    const SsdPlace<true> first(cut);
    const auto fetch = [&](const auto& p, int turn) {
        const bf16* S = chunk_states + p.chunk_state(cut) * P * N;
        fetch_tile<kSsdThreads>(thread, wide, m.C[turn], in.sc + p.row * n.ld + p.h * N, n.ld, p.valid(cut));
        fetch_tile<kSsdThreads>(thread, wide, m.B[turn], in.sb + p.row * n.ld + p.h * N, n.ld, p.valid(cut));
        fetch_tile<kSsdThreads>(thread, narrow, m.X[turn], in.sx + p.row * n.ld + p.h * P, n.ld, p.valid(cut));
        fetch_tile<kSsdThreads>(thread, narrow, m.dY[turn], dY + (p.row * n.H + p.h) * P, n.H * P, p.valid(cut));
        fetch_tile<kSsdThreads>(thread, wide, m.S[turn], S, N, P);
    };
    const auto arrived = [&](int turn) { rotate_fetched<kSsdThreads>(thread, m.angles, wide, m.C[turn], m.B[turn]); };
    const auto token_angles = [&](int h, int j, float(&c)[2], float(&s)[2]) {
        m.angles.get(row + acc_row() + 8 * h, j, c, s);
    };
    // One warp, when the dot products of a chunk are complete.
    const auto finish = [&](const auto& p, const SsdDots& d) {
        const auto put = [&](int t, float sum) {
            if (t < p.valid(cut)) {
                ddt[(p.row + t) * n.H + p.h] = d.X_dXd[t];
                ddA[(p.row + t) * n.H + p.h] = sum;
            }
        };
        log_decay_gradient(
            kChunk, d.S_dS, [&](int t) { return d.C_dC[t] - d.B_dB[t]; }, put);
    };
    const int r0 = row + acc_row(), r1 = r0 + 8;
    if (warp < 4) {
        SsdPlace<true> before = first;  // the chunk before this one
        int last = -1;                  // and its turn
        ssd_sweep<1>(m, in, cut, first, warp == 3, fetch, arrived, [&](const auto& at, bool, int, int turn) {
            const SsdVectors& v = m.vectors[turn];
            SsdDots& dots = m.dots[turn];
            const int rows = at.valid(cut) - row;
            if (last >= 0 && warp == 2) finish(before, m.dots[last]);
            Rows<bf16, N> b;
            Rows<bf16, P> x;
            b.load(m.B[turn] + row * ldn, ldn);
            x.load(m.X[turn] + row * ldp, ldp);
            Rows<bf16, 32> MG[2], ME[2];
#pragma unroll
            for (int u = 0; u < 2; ++u)
                if (32 * u + 31 >= row) {
                    Accumulator<4> g, e;
                    g.zero();
                    e.zero();
                    multiply<Layout::transposed>(g, b, m.C[turn] + 32 * u * ldn, ldn);
                    multiply<Layout::transposed>(e, x, m.dY[turn] + 32 * u * ldp, ldp);
#pragma unroll
                    for (int h = 0; h < 2; ++h) {
                        const int s = r0 + 8 * h;
                        const float cs = v.log2_cs[s], step = v.step[s];
#pragma unroll
                        for (int k = 0; k < 4; ++k)
#pragma unroll
                            for (int i = 0; i < 2; ++i) {
                                const int t = 32 * u + 8 * k + acc_col() + i;
                                const float decay = t >= s ? exp2_fast(v.log2_cs[t] - cs) : 0.0f;
                                g.v[k][2 * h + i] *= decay;
                                e.v[k][2 * h + i] *= decay * step;
                            }
                    }
                    MG[u].take(g, nullptr);
                    ME[u].take(e, nullptr);
                }
            float sums[2];
            {
                Accumulator<P / 8> dx;  // dXd
                dx.zero();
                multiply<Layout::transposed>(dx, b, m.dS[turn], ldn);
                dx.scale_rows(v.to_end[r0], v.to_end[r1]);
#pragma unroll
                for (int u = 0; u < 2; ++u)
                    if (32 * u + 31 >= row) multiply<Layout::plain>(dx, MG[u], m.dY[turn] + 32 * u * ldp, ldp);
                row_dots(sums, dx, x);
                put_sums(dots.X_dXd + row, sums);
                dx.scale_rows(v.step[r0], v.step[r1]);
                write_rows(dsx + (at.row + row) * n.ld + at.h * P, n.ld, dx, rows);
            }
            Accumulator<N / 8> db;
            db.zero();
            multiply<Layout::plain>(db, x, m.dS[turn], ldn);
            db.scale_rows(v.into[r0], v.into[r1]);
            row_dots(sums, db, b);
            const float part = warp_sum(sums[0] + sums[1]);
            if (lane_id() == 0) dots.S_dS[warp] = part;
#pragma unroll
            for (int u = 0; u < 2; ++u)
                if (32 * u + 31 >= row) multiply<Layout::plain>(db, ME[u], m.C[turn] + 32 * u * ldn, ldn);
            row_dots(sums, db, b);
            put_sums(dots.B_dB + row, sums);
            rotate_rows(db, -1.0f, token_angles);
            write_rows(dsb + (at.row + row) * n.ld + at.h * N, n.ld, db, rows);
            before = at;
            last = turn;
        });
        block_barrier();  // the last chunk's dot products are complete
        if (warp == 2) finish(before, m.dots[last]);
        return;
    }
    Accumulator<N / 8> state;  // dS
    enter<N>(state, first, cut, ends, row, in.rope);
    write_rows(wide, m.dS[0], row, state);
    ssd_sweep<1>(m, in, cut, first, false, fetch, arrived, [&](const auto& at, bool more, int, int turn) {
        const SsdVectors& v = m.vectors[turn];
        SsdDots& dots = m.dots[turn];
        const int rows = at.valid(cut) - row;
        Rows<bf16, 32> ME[2];
        Rows<bf16, P> d;
        d.load(m.dY[turn] + row * ldp, ldp);
#pragma unroll
        for (int u = 0; u < 2; ++u)
            if (32 * u <= row + 15) {
                Accumulator<4> e;
                e.zero();
                multiply<Layout::transposed>(e, d, m.X[turn] + 32 * u * ldp, ldp);
                weigh(e, v, row, 32 * u);
                ME[u].take(e, nullptr);
            }
        Accumulator<N / 8> dc;
        dc.zero();
        multiply<Layout::plain>(dc, d, m.S[turn], ldn);
        dc.scale_rows(v.from_in[r0], v.from_in[r1]);
#pragma unroll
        for (int u = 0; u < 2; ++u)
            if (32 * u <= row + 15) multiply<Layout::plain>(dc, ME[u], m.B[turn] + 32 * u * ldn, ldn);
        Rows<bf16, N> c;
        c.load(m.C[turn] + row * ldn, ldn);
        float sums[2];
        row_dots(sums, dc, c);
        put_sums(dots.C_dC + row, sums);
        rotate_rows(dc, -1.0f, token_angles);
        write_rows(dsc + (at.row + row) * n.ld + at.h * N, n.ld, dc, rows);
        Rows<bf16, N> s;
        s.load(m.S[turn] + row * ldn, ldn);
        row_dots(sums, state, s);
        const float part = warp_sum(sums[0] + sums[1]);
        if (lane_id() == 0) dots.S_dS[warp] = v.from_in[kChunk - 1] * part;
        Rows<bf16, kChunk> scaled;
        load_scaled_transposed(scaled, narrow, m.dY[turn], row, v.from_in);
        const float all = v.from_in[kChunk - 1];
        state.scale_rows(all, all);
        multiply<Layout::plain>(state, scaled, m.C[turn], ldn);
        hand_over<N>(state, at, cut, ends, row, in.rope, m.angles);
        if (more) write_rows(wide, m.dS[turn ^ 1], row, state);
    });
    block_barrier();  // as above
}

// ---- 7c and 7d: the launchers -----------------------------------------------------------------------------------------

// A block for each multiprocessor, if each has 4 chunks to do, or else whole pairs. Heads go abreast as far as (almost)
// no multiprocessor is left without work.
static SsdCut ssd_cut(const SsdShape& n, const SsdTiles& t) {
    const int64 chunks = ssd_chunks(t, n.T), pairs = n.B * n.H, most = multiprocessors();
    if (pairs > INT32_MAX / 8) fail("SSD: %lld sequences are too many for one batch", (long long)n.B);
    int64 abreast = n.H;
    while (n.H % abreast != 0 || most % abreast * 64 > most) --abreast;
    const int64 groups = pairs / abreast;
    const int64 ranges = std::min(most / abreast, std::max(groups, ceil_div(groups * chunks, 4)));
    return {int(n.H), int(n.T), int(chunks), int(abreast), int(groups), int(ranges)};
}
// Floats of scratch: states at borders, then flags (chained), or of few pairs a copy of S_0, the states of the finer ranges
// and their decays.
static int64 ssd_scratch(const SsdShape& n, const SsdTiles& t) {
    if (!t.fast) return 0;
    const SsdCut cut = ssd_cut(n, t);
    const int64 PN = n.P * n.N;
    return cut.blocks() * (PN + 4) + (cut.few() ? cut.pairs() * PN + cut.blocks() * kSsdParts * (PN + 1) : 0);
}
// Calls f(N, team), as types, for the fast form that fits.
template <class F>
static void ssd_form(int64 N, F f) {
    with_number<64, 128>(N, [&](auto kN) { with_number<1, 4>(has_wgmma() ? 4 : 1, [&](auto team) { f(kN, team); }); });
}
// Before a fast sweep: clears the flags of its borders, or fills the borders.
template <int N, int team, bool kReverse>
static SsdEnds ssd_prepare(const char* name, const float* first, float* last, float* borders, const bf16* fn,
                           const bf16* fp, int64 ld_p, const SsdInput<bf16>& in, const SsdCut& cut,
                           cudaStream_t stream) {
    const int64 PN = in.n.P * N, ranges = cut.blocks() * kSsdParts;
    float *behind = borders + cut.blocks() * PN, *states = behind + cut.pairs() * PN,
          *log_decays = states + ranges * PN;
    int* flags = reinterpret_cast<int*>(behind);
    if (cut.chained()) CHECK_CUDA(cudaMemsetAsync(flags, 0, size_t(4 * cut.blocks()) * sizeof(int), stream));
    if (!cut.few()) return {first, last, borders, flags};
    launch(name, ssd_states_kernel<N, team, kReverse>, ranges, 256, sizeof(SsdShared<N, team, 3>), stream, states,
           log_decays, fn, fp, ld_p, in, cut);
    launch(name, pass_states_kernel, ceil_div(cut.pairs() * PN, 256), 256, 0, stream, borders, behind, states,
           log_decays, first, PN, cut);
    return {behind, last, borders, nullptr};
}

// C and B come as the projection made them, and so do their gradients leave: RoPE is inside. The fast kernels copy 16
// bytes at a time: sc, sb and sx begin at multiples of 16 bytes, n.ld is a multiple of 8. S_T, chunk_states and S_0
// may be null: not wanted, or zero. S_0 and S_T may be the same memory.
template <class A>
static void ssd_forward(A* Y, float* S_T, A* chunk_states, float* scratch, const A* sc, const A* sb, const A* sx,
                        const float* dt, const float* dA, const float* S_0, const SsdRope& rope, const SsdShape& n,
                        const SsdTiles& t, cudaStream_t stream) {
    const SsdInput<A> in = {sc, sb, sx, dt, dA, rope, n};
    if constexpr (!std::is_same<A, float>::value)
        if (t.fast)
            return ssd_form(n.N, [&](auto kN, auto kTeam) {
                constexpr int N = decltype(kN)::value, team = decltype(kTeam)::value;
                const SsdCut cut = ssd_cut(n, t);
                const SsdEnds ends =
                    ssd_prepare<N, team, false>("ssd_forward", S_0, S_T, scratch, sb, sx, n.ld, in, cut, stream);
                launch(cut.chained(), "ssd_forward",
                       chunk_states ? ssd_forward_fast_kernel<N, team, true> : ssd_forward_fast_kernel<N, team, false>,
                       cut.blocks(), kForwardThreads, sizeof(SsdForwardShared<N, team>), stream, Y, chunk_states, ends,
                       in, cut);
            });
    const bool small = t.units() <= 2 * kSsdWarps;
    launch("ssd_forward", small ? ssd_forward_kernel<A, 2> : ssd_forward_kernel<A, 8>, n.B * n.H, kSsdThreads,
           ssd_shared<A>(t, false), stream, Y, S_T, chunk_states, S_0, in, t);
}
template <class A>
static void ssd_backward(A* dsc, A* dsb, A* dsx, float* ddt, float* ddA, float* dS_0, float* scratch, const A* dY,
                         const float* dS_T, const A* sc, const A* sb, const A* sx, const float* dt, const float* dA,
                         const A* chunk_states, const SsdRope& turn, const SsdShape& n, const SsdTiles& t,
                         cudaStream_t stream) {
    const SsdInput<A> in = {sc, sb, sx, dt, dA, turn, n};
    if constexpr (!std::is_same<A, float>::value)
        if (t.fast)
            return ssd_form(n.N, [&](auto kN, auto kTeam) {
                constexpr int N = decltype(kN)::value, team = decltype(kTeam)::value;
                const SsdCut cut = ssd_cut(n, t);
                const SsdEnds ends =
                    ssd_prepare<N, team, true>("ssd_backward", dS_T, dS_0, scratch, sc, dY, n.H * n.P, in, cut, stream);
                launch(cut.chained(), "ssd_backward", ssd_backward_fast_kernel<N>, cut.blocks(), kSsdThreads,
                       sizeof(SsdBackwardShared<N>), stream, dsc, dsb, dsx, ddt, ddA, dY, chunk_states, ends, in, cut);
            });
    const bool small = t.units() <= 2 * kSsdWarps;
    launch("ssd_backward", small ? ssd_backward_kernel<A, 2> : ssd_backward_kernel<A, 8>, n.B * n.H, kSsdThreads,
           ssd_shared<A>(t, true), stream, dsc, dsb, dsx, ddt, ddA, dS_0, dY, dS_T, chunk_states, in, t);
    if (turn.cos)
        for (A* d : {dsc, dsb}) rope(d, turn.cos, turn.sin, n.N, n.B, n.T, n.H, n.ld, turn.before, true, stream);
}
// ---------------------------------------------------------------------------------------------------------------------
// 8  Residual: out = w * x + dropout(m), and the norm that follows: u = rmsnorm(out) * w_norm
// ---------------------------------------------------------------------------------------------------------------------
// Every half of a layer is  x -> u = rmsnorm(x) * w_norm -> m = f(u) -> out = w * x + dropout(m),  and out is the
// next half's x. These kernels join a residual with the norm after it (forward) and a norm with the residual around
// it (backward): each tensor then crosses the memory bus once. They are bound by it.
//
// A row lies in the registers of a few warps of a block, as few as can hold it where rows are many: one for D <= 768, so
// that its sum is a matter of shuffles and no thread waits for another warp. A thread has K packs of W neighbouring columns, the
// packs of neighbouring threads side by side. All loads of a row come before the first use.
//
// Rows are taken from the last to the first, here and in section 9: of what the matrix product before has written the
// last rows are still in the L2 cache, and the product after begins with the first ones.

static constexpr int kNormThreads = 256, kNormWarps = kNormThreads / 32;
static constexpr int64 kNormMaxD = 8192;
static constexpr int64 kNormBlocks = 264;  // of a backward: two for each of 132 multiprocessors, whatever the GPU

struct RowCut {
    int W, K, warps;  // W K 32 warps >= D
};
// For D up to kNormMaxD. vectors: every row and every weight begins at a multiple of 4 numbers. A few rows (a short prompt,
// decoding's final norm) do not fill the GPU: there a row has as many warps as it can use, since the packs of a thread wait
// for each other.
static RowCut row_cut(int64 D, bool vectors, bool few_rows = false) {
    RowCut cut{vectors ? 4 : 1, 0, 1};
    const int few = few_rows ? 1 : vectors ? 6 : 8, many = vectors ? 8 : 32;
    const auto needed = [&] { return int(ceil_div(D, cut.W * 32 * cut.warps)); };
    while (cut.warps < kNormWarps && needed() > few) cut.warps *= 2;
    cut.K = needed() > (vectors ? 6 : 8) ? many : vectors ? needed() + needed() % 2 : 8;
    return cut;
}
// A pack as it came from memory, in whole registers, until it is needed. One that lies beyond the row counts as zero,
// and is read from the row's beginning: a load under a condition would make the next ones wait for its result.
template <class A, int W>
struct RawPack {
    static constexpr int kBytes = W * int(sizeof(A));
    using Bits =
        std::conditional_t<kBytes == 16, uint4,
                           std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, uint32_t, uint16_t>>>;
    Bits bits;

    __device__ void read(const A* row, int c, int D) {
        bits = *reinterpret_cast<const Bits*>(row + (c < D ? c : 0));
        if (c >= D) bits = {};
    }
    __device__ void read(const A* p) { bits = *reinterpret_cast<const Bits*>(p); }
    __device__ void write(A* row, int c, int D) const {
        if (c < D) *reinterpret_cast<Bits*>(row + c) = bits;
    }
    __device__ void get(float (&f)[W]) const {
        A v[W];
        memcpy(v, &bits, kBytes);
#pragma unroll
        for (int i = 0; i < W; ++i) f[i] = to_float(v[i]);
    }
    __device__ void set(const float (&f)[W]) {
        A v[W];
#pragma unroll
        for (int i = 0; i < W; ++i) v[i] = from_float<A>(f[i]);
        memcpy(&bits, v, kBytes);
    }
    // Makes the compiler forget the numbers it got: it would rather keep them, in twice as many registers, than convert
    // again.
    __device__ void forget() {
        if constexpr (kBytes == 8) asm volatile("" : "+r"(bits.x), "+r"(bits.y));
    }
};
// Calls body(W, K), as types.
template <class F>
static void with_row_cut(const RowCut& cut, F body) {
    if (cut.W == 1) with_number<8, 32>(cut.K, [&](auto K) { body(std::integral_constant<int, 1>(), K); });
    else with_number<2, 4, 6, 8>(cut.K, [&](auto K) { body(std::integral_constant<int, 4>(), K); });
}

// Sum over the threads of a row: `warps` warps (a power of 2). With more than one, all of the block must call it. Two
// buffers take turns, so that one barrier is enough: no warp writes one before all have read it and met once more.
__device__ inline float row_sum(float x, int warps, float* buffer) {  // buffer[kNormWarps]
    x = warp_sum(x);
    if (warps == 1) return x;
    const int warp = int(threadIdx.x) / 32, first = warp - warp % warps;
    if (lane_id() == 0) buffer[warp] = x;
    block_barrier();  // counts warps: those without a row come to it from another line
    x = 0;
    for (int w = first; w < first + warps; ++w) x += buffer[w];
    return x;
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

// m null: no residual, x is normalised and out is not written. One row per `warps` warps.
template <class A, int W, int K>
__global__ void __launch_bounds__(kNormThreads)
    residual_norm_forward_kernel(A* out, A* u, float* rstd, const A* x, const A* m, const float* w_res,
                                 const float* w_norm, float eps, DropoutMask mask, int64 rows, int D, int warps) {
    __shared__ float buffer[kNormWarps];
    const int thread = int(threadIdx.x) % (32 * warps), group = int(threadIdx.x) / (32 * warps);
    const int c0 = thread * W, stride = 32 * warps * W;
    const int64 r = rows - 1 - (int64(blockIdx.x) * (kNormWarps / warps) + group);
    if (r < 0) {
        row_sum(0, warps, buffer);  // the others wait for it
        return;
    }
    RawPack<A, W> xv[K], mv[K];
#pragma unroll
    for (int k = 0; k < K; ++k) xv[k].read(x + r * D, c0 + k * stride, D);
    if (m)
#pragma unroll
        for (int k = 0; k < K; ++k) mv[k].read(m + r * D, c0 + k * stride, D);
    float v[K][W], sum = 0;  // the numbers to be normalised, as they are stored: the sum, rounded to A
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int c = c0 + k * stride;
        if (m) {
            float w[W] = {}, f[W], mi[W];
            if (c < D) load<W>(w, w_res + c);
            if (mask.threshold) dropout_factors<W>(f, mask, r * D + c);
            xv[k].get(v[k]);
            mv[k].get(mi);
#pragma unroll
            for (int i = 0; i < W; ++i) v[k][i] = w[i] * v[k][i] + (mask.threshold ? mi[i] * f[i] : mi[i]);
            xv[k].set(v[k]);
            xv[k].write(out + r * D, c, D);
        }
        xv[k].get(v[k]);
#pragma unroll
        for (int i = 0; i < W; ++i) sum += v[k][i] * v[k][i];
    }
    const float s = 1.0f / sqrtf(row_sum(sum, warps, buffer) / float(D) + eps);
    if (thread == 0) rstd[r] = s;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int c = c0 + k * stride;
        float w[W] = {};
        if (c < D) load<W>(w, w_norm + c);
#pragma unroll
        for (int i = 0; i < W; ++i) v[k][i] *= s * w[i];
        xv[k].set(v[k]);
        xv[k].write(u + r * D, c, D);
    }
}
template <class A>
static void residual_norm_forward(A* out, A* u, float* rstd, const A* x, const A* m, const float* w_res,
                                  const float* w_norm, double eps, const Dropout& dropout, int64 rows, int64 D,
                                  cudaStream_t stream) {
    const RowCut cut = row_cut(D, D % 4 == 0 && (uintptr_t(w_res) | uintptr_t(w_norm)) % 16 == 0, rows <= 512);
    with_row_cut(cut, [&](auto W, auto K) {
        launch(m ? "residual_norm_forward" : "rmsnorm_forward",
               residual_norm_forward_kernel<A, decltype(W)::value, decltype(K)::value>,
               ceil_div(rows, kNormWarps / cut.warps), kNormThreads, 0, stream, out, u, rstd, x, m, w_res, w_norm,
               float(eps), dropout_mask(dropout), rows, int(D), cut.warps);
    });
}

// dx = w_res dout + rstd (du w_norm - x rstd^2 sum(du w_norm x) / D)       dout null: no residual, its term is absent
// dw_norm += sum_rows du x rstd,   dw_res += sum_rows dout x
// dx and dout may be the same memory. A thread adds up its columns of all rows that it meets in registers; at the end
// the block's sums are joined in shared memory, (groups, 2D). partial (blocks, 2D): sums for dw_norm | dw_res.
template <class A, int W, int K>
__global__ void __launch_bounds__(kNormThreads, K*(2 * W + 3 * std::max(1, W* int(sizeof(A)) / 4)) <= 90 ? 2 : 1)
    norm_residual_backward_kernel(A* dx, float* partial, const A* dout, const A* du, const A* x, const float* w_res,
                                  const float* w_norm, const float* rstd, int64 rows, int D, int warps) {
    __shared__ float buffers[2][kNormWarps];
    extern __shared__ __align__(16) float sums[];
    const int thread = int(threadIdx.x) % (32 * warps), group = int(threadIdx.x) / (32 * warps);
    const int c0 = thread * W, stride = 32 * warps * W;
    const int64 groups = kNormWarps / warps;
    float sum_norm[K][W] = {}, sum_res[K][W] = {};
    int turn = 0;
    for (int64 first = rows - 1 - blockIdx.x * groups; first >= 0; first -= gridDim.x * groups, turn ^= 1) {
        const int64 r = first - group;
        if (r < 0) {
            row_sum(0, warps, buffers[turn]);  // the others wait for it
            break;
        }
        RawPack<A, W> xv[K], duv[K], doutv[K];
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = c0 + k * stride;
            xv[k].read(x + r * D, c, D);
            duv[k].read(du + r * D, c, D);
            doutv[k].read((dout ? dout : x) + r * D, c, D);  // x: no matter which, its weight is 0
        }
        const float s = rstd[r];
        float dot = 0;
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = c0 + k * stride;
            float wn[W] = {}, xi[W], dui[W];
            if (c < D) load<W>(wn, w_norm + c);
            xv[k].get(xi);
            duv[k].get(dui);
#pragma unroll
            for (int i = 0; i < W; ++i) dot += dui[i] * wn[i] * xi[i];
            xv[k].forget();
            duv[k].forget();
        }
        const float back = s * s * row_sum(dot, warps, buffers[turn]) / float(D);
#pragma unroll
        for (int k = 0; k < K; ++k) {
            const int c = c0 + k * stride;
            float wn[W] = {}, wr[W] = {}, xi[W], dui[W], douti[W], dxi[W];
            if (c < D) load<W>(wn, w_norm + c);
            if (c < D && dout) load<W>(wr, w_res + c);
            xv[k].get(xi);
            duv[k].get(dui);
            doutv[k].get(douti);
#pragma unroll
            for (int i = 0; i < W; ++i) {
                dxi[i] = wr[i] * douti[i] + s * (dui[i] * wn[i] - xi[i] * back);
                sum_norm[k][i] += dui[i] * xi[i] * s;
                sum_res[k][i] += douti[i] * xi[i];  // without dout not used
            }
            xv[k].set(dxi);
            xv[k].write(dx + r * D, c, D);
        }
    }
    float* own = sums + int64(group) * 2 * D;
#pragma unroll
    for (int k = 0; k < K; ++k) {
        const int c = c0 + k * stride;
        if (c >= D) continue;
        store<W>(own + c, sum_norm[k]);
        store<W>(own + D + c, sum_res[k]);
    }
    __syncthreads();  // every group's sums are there
    for (int c = int(threadIdx.x); c < 2 * D; c += int(blockDim.x)) {
        float s = 0;
        for (int g = 0; g < int(groups); ++g) s += sums[int64(g) * 2 * D + c];
        partial[blockIdx.x * 2 * D + c] = s;
    }
}
// dw_res null with dout null.
template <class A>
static void norm_residual_backward(A* dx, float* dw_norm, float* dw_res, float* partial, const A* dout, const A* du,
                                   const A* x, const float* w_res, const float* w_norm, const float* rstd, int64 rows,
                                   int64 D, cudaStream_t stream) {
    const RowCut cut = row_cut(D, D % 4 == 0 && (uintptr_t(w_res) | uintptr_t(w_norm)) % 16 == 0);
    const int64 blocks = std::min(kNormBlocks, ceil_div(rows, kNormWarps / cut.warps));
    with_row_cut(cut, [&](auto W, auto K) {
        launch("norm_residual_backward", norm_residual_backward_kernel<A, decltype(W)::value, decltype(K)::value>,
               blocks, kNormThreads, size_t(kNormWarps / cut.warps * 2 * D) * sizeof(float), stream, dx, partial, dout,
               du, x, w_res, w_norm, rstd, rows, int(D), cut.warps);
    });
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
// One thread makes W elements; bound by memory. On Hopper, for many tokens in bf16, the matrix products before it do its
// work: see below. Both give the same bits.

// To float's accuracy where the result stays fp32, by the hardware's instructions where it is rounded to bf16.
template <class A>
__device__ inline float sigmoid_for(float x) {
    const float e = 1.0f + (std::is_same<A, float>::value ? expf(-x) : exp2_fast(-x * kLog2e));
    if (std::is_same<A, float>::value) return 1.0f / e;
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(e));
    return y;
}
template <class A>
__device__ inline float swiglu(float g, float u) {
    return u * (g * sigmoid_for<A>(g));
}
// du = dh silu(g);  dg = dh u silu'(g),  silu'(g) = sigmoid(g) (1 + g (1 - sigmoid(g)))
// (g, u, dh) become (dg, du, h). h is made again: the forward need not keep it (0.4 GB a layer for `320m` at 65,536
// tokens), and the gradient of W_down reads it next.
template <class A>
__device__ inline void swiglu_backward(float& g, float& u, float& dh_h) {
    const float s = sigmoid_for<A>(g), silu = g * s, dh = dh_h;
    dh_h = u * silu;  // to the bit as the forward made it
    g = dh * u * s * (1.0f + g * (1.0f - s));
    u = dh * silu;
}

template <class A, int W>
__global__ void swiglu_forward_kernel(A* h, const A* gate_up, int64 n, int64 F) {
    const int64 i = (int64(gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    const int64 r = i / F, f = i % F;
    float g[W], u[W];
    load<W>(g, gate_up + r * 2 * F + f);
    load<W>(u, gate_up + r * 2 * F + F + f);
#pragma unroll
    for (int k = 0; k < W; ++k) u[k] = swiglu<A>(g[k], u[k]);
    store<W>(h + i, u);
}
template <class A>
static void swiglu_forward(A* h, const A* gate_up, int64 rows, int64 F, cudaStream_t stream) {
    const int W = F % 8 == 0 ? 8 : 1;
    launch("swiglu_forward", W == 8 ? swiglu_forward_kernel<A, 8> : swiglu_forward_kernel<A, 1>,
           ceil_div(rows * F, 256 * W), 256, 0, stream, h, gate_up, rows * F, F);
}
template <class A, int W>
__global__ void swiglu_backward_kernel(A* dgate_up, A* dh_h, const A* gate_up, int64 n, int64 F) {
    const int64 i = (int64(gridDim.x - 1 - blockIdx.x) * blockDim.x + threadIdx.x) * W;
    if (i >= n) return;
    const int64 r = i / F, f = i % F, at = r * 2 * F + f;
    float g[W], u[W], d[W];
    load<W>(g, gate_up + at);
    load<W>(u, gate_up + at + F);
    load<W>(d, dh_h + i);
#pragma unroll
    for (int k = 0; k < W; ++k) swiglu_backward<A>(g[k], u[k], d[k]);
    store<W>(dgate_up + at, g);
    store<W>(dgate_up + at + F, u);
    store<W>(dh_h + i, d);
}
template <class A>
static void swiglu_backward(A* dgate_up, A* dh_h, const A* gate_up, int64 rows, int64 F, cudaStream_t stream) {
    const int W = F % 8 == 0 ? 8 : 1;
    launch("swiglu_backward", W == 8 ? swiglu_backward_kernel<A, 8> : swiglu_backward_kernel<A, 1>,
           ceil_div(rows * F, 256 * W), 256, 0, stream, dgate_up, dh_h, gate_up, rows * F, F);
}

// ---- SwiGLU as the end of a product, on Hopper ------------------------------------------------------------------------
// The forward kernel makes [gate|up] = x W' and, from what it rounds, h; the backward one dh = dy W_down, which never is in
// memory, and from it and gate and up their gradients and h. An output is cut into tiles of 128 rows, forward by 96 columns
// of gate and the same 96 of up, backward by 128 columns of dh. One block per multiprocessor; two blocks, a cluster, have
// tiles one above the other. Each fetches half of the right operand's tile, for both.
//
//     warp 0          asks for both operands, 64 of the inner dimension at a time: a ring of kStages buffers
//     warps 1, 2      of the backward: ask for gate and up, 64 x 64 numbers each at a time, for one team each
//     warps 4-7       team 0:  | products of tile 0 | SwiGLU, stores     | products of tile 2 | SwiGLU, stores     | ...
//     warps 8-11      team 1:                       | products of tile 1 | SwiGLU, stores     | products of tile 3 | ...
//
// So one team's products hide the other's last step. A thread has 192 accumulators, in the backward 128. Four threads hold 32
// columns of a row, two of each eight, and trade them for eight neighbours each, so that whole sectors are stored.
//
// A buffer is `filled` when its bytes are there, and `free` when the eight warps that read it, a team in each block, have said
// so. A barrier tells only the last phase from the one before it, so that a team waits for its first buffer
// only when the other is past its last one (named barriers 1 and 2). Blocks leave together: until then the other one may
// write here.
//
// 320m, 65,536 tokens, one H100: forward, alone, 2 to 5% longer than the library's product without SwiGLU; the backward moves
// 2.1 GB at 78% of a copy's speed. Shared memory: 201 KB and 225 KB per block.
template <bool kBackward>
struct GluShared {
    static constexpr int kStages = 5, kN = kBackward ? 128 : 192, kColumns = kBackward ? 128 : 96;
    bf16 left[kStages][128 * 64], right[kStages][kN * 64];
    bf16 given[2][2][kBackward ? 2 * 64 * 64 : 64];  // for each team, twice: gate and up
    uint64_t filled[kStages], free[kStages], given_filled[2][2], given_free[2][2];
};
struct GluMaps {
    CUtensorMap left, right, gate_up;
};
static constexpr int kGluThreads = 384;

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
// 64 columns and some rows of a tensor (make_map) into this block's tile, or at the same place into both blocks'.
template <bool both>
__device__ inline void copy_panel(bf16* to, const CUtensorMap& map, int64 panel, int64 row, uint64_t* barrier) {
    if (both)
        asm volatile(
            "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
            " [%0], [%1, {%2, %3, %4, %2}], [%5], %6;" ::"r"(shared_address(to)),
            "l"(&map), "r"(0), "r"(int(panel)), "r"(int(row)), "r"(shared_address(barrier)), "h"(uint16_t(3))
            : "memory");
    else copy_box(shared_address(to), &map, 0, int(panel), int(row), 0, shared_address(barrier));
}
__device__ inline void cluster_barrier() {
    asm volatile("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;" ::: "memory");
}
// The warp has read what the barrier stands for: told to this block or to both.
template <bool both>
__device__ inline void tell_free(uint64_t* barrier) {
    __syncwarp();
    if (both && lane_id() < 2)
        asm volatile(
            "{.reg .b32 r; mapa.shared::cluster.u32 r, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [r];}" ::"r"(
                shared_address(barrier)),
            "r"(lane_id())
            : "memory");
    if (!both && lane_id() == 0) arrive(shared_address(barrier));
}
// Of four threads each holds words 0..3, word i being columns 8i + 2 (lane%4) and the next: afterwards columns
// 8 (lane%4) .. + 7.
__device__ inline void trade_columns(uint32_t (&w)[4]) {
#pragma unroll
    for (int d = 1; d <= 2; ++d) {
        const bool upper = lane_id() & d;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (i & d) continue;
            const uint32_t got = __shfl_xor_sync(~0u, upper ? w[i] : w[i + d], d);
            (upper ? w[i] : w[i + d]) = got;
        }
    }
}
__device__ inline void store_words(bf16* to, const uint32_t (&w)[4]) {
    *reinterpret_cast<uint4*>(to) = make_uint4(w[0], w[1], w[2], w[3]);
}
#endif

// y: gate_up, backward its gradient. h: forward, null if it is not wanted. K: the inner dimension.
template <bool kBackward>
__global__ void WGMMA(__cluster_dims__(2)) __launch_bounds__(kGluThreads, 1)
    glu_kernel(bf16* y, bf16* h, const __grid_constant__ GluMaps maps, int64 rows, int64 F, int64 K) {
#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
    using Shared = GluShared<kBackward>;
    constexpr int kStages = Shared::kStages, kN = Shared::kN, kColumns = Shared::kColumns;
    extern __shared__ __align__(1024) unsigned char glu_memory[];
    Shared& s = *reinterpret_cast<Shared*>(glu_memory);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            init_barrier(shared_address(&s.filled[i]), 1);
            init_barrier(shared_address(&s.free[i]), 8);
        }
        for (int i = 0; i < 4; ++i) {
            init_barrier(shared_address(&s.given_filled[i / 2][i % 2]), 1);
            init_barrier(shared_address(&s.given_free[i / 2][i % 2]), 4);
        }
        asm volatile("fence.mbarrier_init.release.cluster; fence.proxy.async.shared::cta;" ::: "memory");
    }
    __syncthreads();
    cluster_barrier();
    // Tiles in the order of this block's work: across the columns first, so that rows of the left operand are read once from
    // memory; the right operand stays in the L2 cache.
    const int across = int((F + kColumns - 1) / kColumns), tiles = int((rows + 255) / 256) * across;
    const int block = int(blockIdx.x) % 2, first = int(blockIdx.x) / 2, stride = int(gridDim.x) / 2,
              steps = int(K / 64);
    const auto column = [&](int tile) { return tile % across * kColumns; };
    const auto row = [&](int tile) { return int64(tile / across * 2 + block) * 128; };
    const int role = __shfl_sync(~0u, int(threadIdx.x) / 128, 0);
    if (role == 0) {
        set_registers<4, 40, false>();
        if (threadIdx.x == 0) {
            int buffer = 0, phase = 1;
            for (int tile = first; tile < tiles; tile += stride)
                for (int k = 0; k < steps; ++k) {
                    await(&s.free[buffer], phase);
                    uint64_t* filled = &s.filled[buffer];
                    expect_bytes(filled, int(sizeof s.left[0] + sizeof s.right[0]));
                    copy_panel<false>(s.left[buffer], maps.left, k, row(tile), filled);
                    bf16* right = s.right[buffer] + block * (kN / 2 * 64);
                    if (kBackward) copy_panel<true>(right, maps.right, column(tile) / 64 + block, 64 * k, filled);
                    else copy_panel<true>(right, maps.right, k, block * F + column(tile), filled);
                    if (++buffer == kStages) buffer = 0, phase ^= 1;
                }
        } else if (kBackward && (threadIdx.x == 32 || threadIdx.x == 64)) {
            const int team = int(threadIdx.x) / 32 - 1;
            int phase = 1;
            for (int tile = first + team * stride; tile < tiles; tile += 2 * stride)
                for (int i = 0; i < 4; ++i) {  // rows 64 (i/2) .., columns 64 (i%2) ..
                    uint64_t* filled = &s.given_filled[team][i % 2];
                    await(&s.given_free[team][i % 2], phase);
                    expect_bytes(filled, int(sizeof s.given[0][0]));
                    for (int up = 0; up < 2; ++up)
                        copy_panel<false>(s.given[team][i % 2] + up * 64 * 64, maps.gate_up,
                                          (column(tile) + up * F) / 64 + i % 2, row(tile) + i / 2 * 64, filled);
                    if (i % 2) phase ^= 1;
                }
        }
    } else {
        set_registers<4, 232, true>();
        const int team = role - 1, warp = int(threadIdx.x) / 32 % 4, lane = lane_id();
        const auto my_turn = [&] { asm volatile("bar.sync %0, 256;" ::"r"(1 + team) : "memory"); };
        const auto your_turn = [&] { asm volatile("bar.arrive %0, 256;" ::"r"(2 - team) : "memory"); };
        if (team == 1) your_turn();
        int step = team * steps, given_phase = 0;
        for (int tile = first + team * stride; tile < tiles; tile += 2 * stride, step += 2 * steps) {
            Accumulator<kN / 8> acc[2];
            my_turn();
            for (int k = 0; k < steps; ++k) {
                const int buffer = (step + k) % kStages;
                await(&s.filled[buffer], (step + k) / kStages);
                // As Tile::describe, with the distance of panels; an address in a cluster has the block's number above 18 bits.
                const auto operand = [](const bf16* p, int panel) {
                    return Tile<bf16, 64, 64, 4>::describe(shared_address(p) % (1 << 18) / 16 | uint32_t(panel) << 16);
                };
                const uint64_t a = operand(s.left[buffer], 1),
                               b = operand(s.right[buffer], kBackward ? 64 * 128 / 16 : 1);
                wgmma_begin();
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int m = 0; m < 2; ++m)
                        wgmma<kBackward ? Layout::plain : Layout::transposed, kN>(
                            acc[m].v, a + (m * 64 * 128 + i * 32) / 16, b + i * (kBackward ? 16 * 128 : 32) / 16,
                            k > 0 || i > 0);
                wgmma_commit();
                if (k > 0) {
                    products_wait<4, 1>();
                    tell_free<true>(&s.free[(step + k - 1) % kStages]);
                }
            }
            your_turn();
            products_wait<4, 0>(acc);
            tell_free<true>(&s.free[(step + steps - 1) % kStages]);
            // Of row r, 8 numbers from column c on: words() gives them of the product, rounded.
            const auto words = [&](uint32_t(&w)[4], int m, int half, int t) {
#pragma unroll
                for (int i = 0; i < 4; ++i) w[i] = pack(acc[m].v[t + i][2 * half], acc[m].v[t + i][2 * half + 1]);
                trade_columns(w);
            };
#pragma unroll
            for (int i = 0; i < (kBackward ? 4 : 2); ++i) {
                const int m = kBackward ? i / 2 : i;
                if (kBackward) await(&s.given_filled[team][i % 2], given_phase);
#pragma unroll
                for (int half = 0; half < 2; ++half)
#pragma unroll
                    for (int j = 0; j < (kBackward ? 2 : 3); ++j) {  // 32 columns
                        const int in_tile = 16 * warp + lane / 4 + 8 * half;
                        const int64 r = row(tile) + 64 * m + in_tile;
                        const int64 c = column(tile) + (kBackward ? i % 2 * 64 : 0) + 32 * j + lane % 4 * 8;
                        uint32_t g[4], u[4], d[4];
                        words(kBackward ? d : g, m, half, (kBackward ? i % 2 * 8 : 0) + 4 * j);
                        if (kBackward) {
                            const bf16* given =
                                s.given[team][i % 2] + in_tile * 64 + ((4 * j + lane % 4) ^ lane / 4) * 8;
                            memcpy(g, given, 16);
                            memcpy(u, given + 64 * 64, 16);
                        } else {
                            words(u, m, half, kColumns / 8 + 4 * j);
                        }
                        const bool inside = r < rows && c < F;
                        if (!kBackward && inside) {
                            store_words(y + r * 2 * F + c, g);
                            store_words(y + r * 2 * F + F + c, u);
                        }
#pragma unroll
                        for (int k = 0; k < 4; ++k) {
                            float g0 = low_half(g[k]), g1 = high_half(g[k]), u0 = low_half(u[k]), u1 = high_half(u[k]);
                            if (kBackward) {
                                float d0 = low_half(d[k]), d1 = high_half(d[k]);
                                swiglu_backward<bf16>(g0, u0, d0);
                                swiglu_backward<bf16>(g1, u1, d1);
                                g[k] = pack(g0, g1);
                                u[k] = pack(u0, u1);
                                d[k] = pack(d0, d1);
                            } else {
                                d[k] = pack(swiglu<bf16>(g0, u0), swiglu<bf16>(g1, u1));
                            }
                        }
                        if (kBackward && inside) {
                            store_words(y + r * 2 * F + c, g);
                            store_words(y + r * 2 * F + F + c, u);
                        }
                        if (inside && (kBackward || h)) store_words(h + r * F + c, d);
                    }
                if (kBackward) tell_free<false>(&s.given_free[team][i % 2]);
                if (kBackward && i % 2) given_phase ^= 1;
            }
        }
    }
    cluster_barrier();
#endif
}

// The kernel's launch, if it is for such a case.
template <bool kBackward, class A>
static bool glu(A* y, A* h, const A* left, const A* right, const A* gate_up, int64 rows, int64 K, int64 F,
                cudaStream_t stream) {
    if constexpr (std::is_same<A, bf16>::value) {
        if (rows < kManyTokens || rows > INT32_MAX / 2 || K % 64 != 0 || F % 64 != 0 || !has_wgmma()) return false;
        const auto map = [](const bf16* p, int64 columns, int64 count, int box_rows) {  // panels of 64 columns as heads
            return make_map(p, 64, columns / 64, count, 1, columns, count * columns, box_rows);
        };
        const GluMaps maps = {map(left, K, rows, 128), kBackward ? map(right, F, K, 64) : map(right, K, 2 * F, 96),
                              kBackward ? map(gate_up, 2 * F, rows, 64) : CUtensorMap{}};
        launch(kBackward ? "matmul dx + swiglu_backward" : "matmul y + swiglu_forward", glu_kernel<kBackward>,
               multiprocessors() / 2 * 2, kGluThreads, sizeof(GluShared<kBackward>), stream, y, h, maps, rows, F, K);
        return true;
    }
    return false;
}
// gate_up (rows,2F) = x (rows,D) W^T;  h = swiglu(gate_up), unless it is null
template <class A>
static void gate_up_forward(Blas& blas, A* h, A* gate_up, const A* x, const A* w, int64 rows, int64 D, int64 F,
                            cudaStream_t stream) {
    if (glu<false, A>(gate_up, h, x, w, nullptr, rows, D, F, stream)) return;
    linear_forward(blas, gate_up, 2 * F, x, w, rows, D, 2 * F, stream);
    if (h) swiglu_forward(h, gate_up, rows, F, stream);
}
// From the gradient dy (rows,D) of h W_down^T, W_down (D,F): dgate_up, and h.
template <class A>
static void down_backward(Blas& blas, A* dgate_up, A* h, const A* dy, const A* gate_up, const A* w_down, int64 rows,
                          int64 D, int64 F, cudaStream_t stream) {
    if (glu<true, A>(dgate_up, h, dy, w_down, gate_up, rows, D, F, stream)) return;
    linear_backward_input(blas, h, dy, D, w_down, rows, F, D, 1, stream);
    swiglu_backward(dgate_up, h, gate_up, rows, F, stream);
}

// ---------------------------------------------------------------------------------------------------------------------
// 10  Cross-entropy: loss_r = log sum_v exp(z_rv) - z_r,target;   dz = softmax(z) - onehot(target)
// ---------------------------------------------------------------------------------------------------------------------
// One block per row, which it fetches into shared memory (100 KB for V 50,304 in bf16: two blocks fit on a
// multiprocessor of an H100, and while one waits for memory the other works). There (largest, sum of exp(z - largest))
// is found, and dz written over z (unscaled: the matrix products that read it scale): z is read once and written once.
// A row that does not fit is read a second time from memory. Rows are ld = padded8(V) apart; columns beyond V become
// zero.

static constexpr int kCrossEntropyThreads = 512;

template <class A, bool kShared>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_kernel(float* losses, A* logits, const int32_t* targets, int64 V, int64 ld, bool gradient) {
    constexpr int W = 8;
    __shared__ float tops[kCrossEntropyThreads / 32], sums[kCrossEntropyThreads / 32];
    extern __shared__ __align__(16) unsigned char shared[];
    A* z = logits + int64(blockIdx.x) * ld;
    const A* row = kShared ? reinterpret_cast<const A*>(shared) : z;
    const int first = int(threadIdx.x) * W, stride = int(blockDim.x) * W, end = int(ld), target = targets[blockIdx.x];
    if (kShared) {  // a thread reads only what it has copied itself: no barrier
        for (int v = first; v < end; v += stride)
#pragma unroll
            for (int i = 0; i < W; i += 16 / int(sizeof(A))) copy16(shared_address(row + v + i), z + v + i);
        copies_done();
    }
    const auto fetch = [&](float(&f)[W], int v) {
        load<W>(f, row + v);
        if (v + W > V)
#pragma unroll
            for (int i = 0; i < W; ++i)
                if (v + i >= V) f[i] = -INFINITY;
    };
    // exp(f - from), for bf16 as a power of 2: one multiply-add and one instruction
    const auto exp_minus = [](float f, float from) {
        return std::is_same<A, float>::value ? expf(f - from) : exp2_fast(f * kLog2e - from * kLog2e);
    };
    float top = -INFINITY, sum = 0;
    for (int v = first; v < end; v += stride) {
        float f[W];
        fetch(f, v);
        float largest = top;
#pragma unroll
        for (int i = 0; i < W; ++i) largest = fmaxf(largest, f[i]);
        if (largest > top) {
            sum *= expf(top - largest);
            top = largest;
        }
#pragma unroll
        for (int i = 0; i < W; ++i) sum += exp_minus(f[i], top);
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
    if (threadIdx.x == 0) losses[blockIdx.x] = logf(sum) + (top - to_float(row[target]));
    if (!gradient) return;
    __syncthreads();  // row[target] has been read
    for (int v = first; v < end; v += stride) {
        float f[W];
        fetch(f, v);
#pragma unroll
        for (int i = 0; i < W; ++i) f[i] = exp_minus(f[i], lse);
        if (target - v >= 0 && target - v < W)
#pragma unroll
            for (int i = 0; i < W; ++i)
                if (v + i == target) f[i] -= 1;
        store<W>(z + v, f);
    }
}
template <class A>
static void cross_entropy(float* losses, A* logits, const int32_t* targets, int64 rows, int64 V, bool gradient,
                          cudaStream_t stream) {
    const int64 ld = padded8(V), bytes = ld * int64(sizeof(A));
    const bool fits = bytes + 1024 <= shared_memory_per_block();
    launch("cross_entropy", fits ? cross_entropy_kernel<A, true> : cross_entropy_kernel<A, false>, rows,
           kCrossEntropyThreads, fits ? size_t(bytes) : 0, stream, losses, logits, targets, V, ld, gradient);
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
__global__ void adamw_kernel(float* __restrict__ w, A* __restrict__ copy, float* __restrict__ m, float* __restrict__ v,
                             const float* __restrict__ g, const AdamWTile* tiles, AdamWRates o) {
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
#pragma unroll 2  // two sets of loads under way
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
#pragma unroll 8
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
                                    int64 position) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= n) return;
    const int64 r = i / width, c = i % width;
    cache[(r / T * capacity + position + r % T) * width + c] = from[r * ld + c];
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

// What a run of decode steps advances, in device memory: a step is recorded once and replayed, and this is what changes.
struct DecodeCursor {
    int64 position;  // tokens consumed so far
    int64 made;      // tokens chosen in this run
};

// ---- Norms and residuals without kernels of their own ---------------------------------------------------------------
// A half of a layer is  out = w_res * x + W2 f(W1 (w_norm * x) rstd),  rstd = 1 / sqrt(mean(x^2) + eps).  So W1 diag(w_norm)
// is kept (fold_norm_kernel) and multiplies x itself, and the kernel of f, between the products,
// - multiplies what it reads by rstd, which each of its blocks makes from x's row (L2 cache), always in the same order;
// - writes w_res * x to `out`, to which the product with W2 adds. Other blocks still read x: out is not x.
template <class A>
struct ResidualStream {
    A* out;          // (B,D)
    const A* x;      // (B,D)
    const float* w;  // w_res (D)
    int D;
    float eps;

    // Of sequence b, for all threads of the block, which works on no other.
    __device__ float rstd(int64 b) const {
        __shared__ float warps[32];
        constexpr int W = 16 / int(sizeof(A));
        const float sum = warp_sum(D % W == 0 ? squares<W>(x + b * D) : squares<1>(x + b * D));
        if (lane_id() == 0) warps[threadIdx.x / 32] = sum;
        __syncthreads();  // the warps' sums are there
        return rsqrtf(warp_sum(lane_id() < int(blockDim.x) / 32 ? warps[lane_id()] : 0.0f) / float(D) + eps);
    }
    // w_res x of one column: asked for early, since w_res comes from memory, and written when it is there.
    struct Column {
        A x;
        float w;
    };
    __device__ Column ask(int64 b, int c) const { return {x[b * D + c], w[c]}; }
    __device__ void pass_on(int64 b, int c, const Column& at) const {
        out[b * D + c] = from_float<A>(at.w * to_float(at.x));
    }

  private:
    template <int W>
    __device__ float squares(const A* row) const {
        float sum = 0;
        for (int c = int(threadIdx.x) * W; c < D; c += int(blockDim.x) * W) {
            RawPack<A, W> pack;
            float f[W];
            pack.read(row, c, D);
            pack.get(f);
#pragma unroll
            for (int i = 0; i < W; ++i) sum += f[i] * f[i];
        }
        return sum;
    }
};

// folded (rows,in) = W (out,in) diag(w_norm), rounded once; rows beyond W's are zeros.
template <class A>
__global__ void fold_norm_kernel(A* folded, const float* w, const float* w_norm, int64 out, int64 rows, int64 in) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i < rows * in) folded[i] = from_float<A>(i < out * in ? w[i] * w_norm[i % in] : 0.0f);
}

// h (B,F) = swiglu(rstd gate_up). A thread has W neighbours; `parts` blocks share a sequence.
template <class A, int W>
__global__ void __launch_bounds__(128)
    swiglu_step_kernel(A* h, const A* gate_up, ResidualStream<A> residual, int F, int parts) {
    const int64 b = blockIdx.x / parts;
    const int thread = int(blockIdx.x) % parts * 128 + int(threadIdx.x), f = thread * W, D = residual.D;
    RawPack<A, W> gate, up;
    gate.read(gate_up + b * 2 * F, f, F);
    up.read(gate_up + b * 2 * F + F, f, F);
    auto column = residual.ask(b, min(thread, D - 1));
    const float rstd = residual.rstd(b);
    float g[W], u[W];
    gate.get(g);
    up.get(u);
#pragma unroll
    for (int k = 0; k < W; ++k) u[k] = swiglu<A>(rstd * g[k], rstd * u[k]);
    up.set(u);
    up.write(h + b * F, f, F);
    for (int c = thread; c < D; column = residual.ask(b, min(c, D - 1))) {
        residual.pass_on(b, c, column);
        c += parts * 128;
    }
}
template <class A>
static void swiglu_step(A* h, const A* gate_up, const ResidualStream<A>& residual, int64 B, int64 F,
                        cudaStream_t stream) {
    const int W = F % 4 == 0 ? 4 : 1, parts = int(ceil_div(F, 128 * W));
    launch("swiglu_step", W == 4 ? swiglu_step_kernel<A, 4> : swiglu_step_kernel<A, 1>, B * parts, 128, 0, stream, h,
           gate_up, residual, int(F), parts);
}

// ---- SSD: S = a S + dt X (x) B,  y = S C;  a = exp(dA),  C and B turned by RoPE ---------------------------------------
// One warp per kStepRows rows of the state of one (sequence, head), S (B,H,P,N) in place. A lane owns W neighbouring
// pairs (j, j + N/2), which RoPE turns into each other. All rows are asked for before anything else, all else that is read
// before any of it is needed. `parts` blocks of four warps share a sequence.

static constexpr int kStepRows = 4;

// A state is read and written once a token: it is the first to leave the caches.
template <int W>
__device__ inline void load_state(float (&f)[W], const float* p) {
    using Bits = std::conditional_t<W == 2, float2, float>;
    const Bits x = __ldcs(reinterpret_cast<const Bits*>(p));
    memcpy(f, &x, sizeof x);
}
template <int W>
__device__ inline void store_state(float* p, const float (&f)[W]) {
    using Bits = std::conditional_t<W == 2, float2, float>;
    Bits x;
    memcpy(&x, f, sizeof x);
    __stcs(reinterpret_cast<Bits*>(p), x);
}

template <class A, int W>
__global__ void __launch_bounds__(128, 6)
    ssd_step_kernel(A* y, float* S, const A* proj, ResidualStream<A> residual, const float* dt_bias, const float* A_log,
                    const float* cos, const float* sin, bool decay, SsdShape n, const DecodeCursor* cursor, int parts) {
    const int H = int(n.H), N = int(n.N), P = int(n.P), groups = (P + kStepRows - 1) / kStepRows, half = N / 2;
    const int b = int(blockIdx.x) / parts, warp = int(blockIdx.x) % parts * 4 + int(threadIdx.x) / 32;
    const int i = min(warp, H * groups - 1), h = i / groups, p0 = i % groups * kStepRows;  // some have nothing to do
    const int rows = warp < H * groups ? min(kStepRows, P - p0) : 0;
    const int at = h * P + p0;
    float* s = S + (int64(b) * H * P + at) * N;
    const A *row = proj + b * n.ld, *C = row + h * N, *Bt = C + H * N, *X = row + 2 * H * N + at;
    const int64 turns = cursor->position * half;
    float lo[kStepRows][W], hi[kStepRows][W];
    RawPack<A, W> raw_c[2], raw_b[2];
    RawPack<float, W> raw_cos, raw_sin;
    int j = lane_id() * W;
    const auto ask = [&] {
#pragma unroll
        for (int r = 0; r < kStepRows; ++r)
            if (r < rows && j < half) {
                load_state<W>(lo[r], s + r * N + j);
                load_state<W>(hi[r], s + r * N + half + j);
            }
        const int k = min(j, half - W);
        raw_c[0].read(C + k);
        raw_c[1].read(C + half + k);
        raw_b[0].read(Bt + k);
        raw_b[1].read(Bt + half + k);
        raw_cos.read(cos + turns + k);
        raw_sin.read(sin + turns + k);
    };
    ask();
    const int own = max(0, min(lane_id(), rows - 1));  // a lane's row; those beyond do the last one's once more
    const A raw_x = X[own], dt_raw = row[2 * H * N + H * P + h];
    const float bias = dt_bias[h], log = decay ? A_log[h] : 0.0f;
    const auto column = residual.ask(b, at + own);
    const float rstd = residual.rstd(b), dt = softplus(rstd * to_float(dt_raw) + bias);
    const float a = decay ? expf(-expf(log) * dt) : 1.0f;
    residual.pass_on(b, at + own, column);
    float x[kStepRows], sum[kStepRows];
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
        x[r] = __shfl_sync(~0u, dt * rstd * to_float(raw_x), r);
        sum[r] = 0;
    }
    while (j < half) {
        float c1[W], c2[W], b1[W], b2[W], turn_c[W], turn_s[W];
        raw_c[0].get(c1);
        raw_c[1].get(c2);
        raw_b[0].get(b1);
        raw_b[1].get(b2);
        raw_cos.get(turn_c);
        raw_sin.get(turn_s);
#pragma unroll
        for (int k = 0; k < W; ++k) {
            turn_c[k] *= rstd;
            turn_s[k] *= rstd;
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
                store_state<W>(s + r * N + j, lo[r]);
                store_state<W>(s + r * N + half + j, hi[r]);
            }
        j += 32 * W;
        if (j < half) ask();
    }
#pragma unroll
    for (int r = 0; r < kStepRows; ++r) {
        const float total = warp_sum(sum[r]);
        if (lane_id() == r && r < rows) y[int64(b) * H * P + at + r] = from_float<A>(total);
    }
}
// proj: rows C | B | X | dt_raw, n.ld apart, not multiplied by rstd yet; n.T is 1.
template <class A>
static void ssd_step(A* y, float* S, const A* proj, const ResidualStream<A>& residual, const float* dt_bias,
                     const float* A_log, const float* cos, const float* sin, bool decay, const SsdShape& n,
                     const DecodeCursor* cursor, cudaStream_t stream) {
    const bool pairs = n.N % 4 == 0 && n.ld % 2 == 0;
    const int64 parts = ceil_div(n.H * ceil_div(n.P, kStepRows), 4);  // blocks that share a sequence
    launch("ssd_step", pairs ? ssd_step_kernel<A, 2> : ssd_step_kernel<A, 1>, n.B * parts, 128, 0, stream, y, S, proj,
           residual, dt_bias, A_log, cos, sin, decay, n, cursor, int(parts));
}

// ---- Attention: one query of each head over the cache -------------------------------------------------------------------
// A block owns a range of the keys of one sequence (one of `splits`) and as many neighbouring heads as fit, so that it
// reads whole rows of the cache. kLanes lanes share the key of one head, 8 of its P numbers each; `groups` keys are under
// way side by side, and every such group of lanes has an online softmax of its own (powers of 2) and takes kStepKeys keys
// at a time, while the next ones come to shared memory in the background, kRingBytes a thread: a thread fills and reads 8
// numbers of each place and no others, so that nobody waits for anybody. A block leaves, for each head, the largest of its
// scores, the sum of their exponentials relative to it and the sum of the values so weighted, and the last block to be
// done of those with the same heads joins the splits in their order. The new key and value are appended on the way; they
// are taken from the projection, since another block may be writing them.

static constexpr int kDecodeThreads = 384, kStepKeys = 2, kRingBytes = 256, kJoined = 8;
static int attention_lanes(int64 P) { return P % 8 == 0 && P <= 64 ? 8 : 16; }
// Heads that a block takes: a divisor of H.
static int64 attention_heads(int64 H, int64 P) {
    int64 heads = std::max<int64>(1, std::min<int64>(H, 256 / attention_lanes(P)));
    while (H % heads) --heads;
    return heads;
}
// Splits by the state's shape alone, not by how much of it is filled: one block for each of 132 multiprocessors (of an
// H100), or two; where that would leave many of them idle four or eight, in rounds of two; no more than one for every 128
// keys of a full state.
static int64 attention_splits(int64 B, int64 H, int64 P, int64 capacity) {
    const int64 others = B * H / attention_heads(H, P);
    int64 blocks = 132;
    while (blocks < 1056 && blocks / others * others < blocks * 19 / 20) blocks *= 2;
    return std::max<int64>(1, std::min<int64>({blocks / others, ceil_div(capacity, 128), 64}));
}

// Numbers e .. e + 7 of a row of P, zeros beyond its end.
template <class A>
__device__ inline void load_row8(float (&f)[8], const A* row, int e, int P) {
#pragma unroll
    for (int i = 0; i < 8; ++i) f[i] = e + i < P ? to_float(row[e + i]) : 0.0f;
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
    template <int kLanes>
    __device__ void merge() {  // all groups of the warp
#pragma unroll
        for (int d = kLanes; d < 32; d *= 2) {
            const float new_top = fmaxf(top, __shfl_xor_sync(~0u, top, d)), scale = exp2_fast(top - new_top);
            top = new_top;
            sum *= scale;
            sum += __shfl_xor_sync(~0u, sum, d);
#pragma unroll
            for (int i = 0; i < 8; ++i) {
                out[i] *= scale;
                out[i] += __shfl_xor_sync(~0u, out[i], d);
            }
        }
    }
};

// Numbers e .. e + 7 of a row of P, zeros beyond its end, on their way to shared memory until copies_wait.
template <class A>
__device__ inline void fetch_row8(A* to, const A* row, int e, int P) {
#pragma unroll
    for (int i = 0; i < 8; i += 16 / int(sizeof(A))) copy16(shared_address(to + i), e < P ? row + e + i : row, e < P);
}

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
// Number c of the weighted sum over entries 0, step, ... of a block, `count` of them: sums, top, sum.
template <int kWidth>
__device__ inline void join_groups(float* out, float* top, float* sum, const float (*entries)[kWidth + 2], int count,
                                   int step, int c, int P) {
    *top = -1e30f;
    *sum = *out = 0;
    for (int g = 0; g < count; ++g) *top = fmaxf(*top, entries[g * step][kWidth]);
    for (int g = 0; g < count; ++g) {
        const float scale = exp2_fast(entries[g * step][kWidth] - *top);
        *sum += scale * entries[g * step][kWidth + 1];
        if (c < P) *out += scale * entries[g * step][c];
    }
}

// y (B,H,P). partial (B,H,splits,P+2): the weighted sum of values | top | sum; the last block to be done of those that share
// a sequence and its heads joins them, always in the same order. tickets: zeros, one for each `splits` blocks, and zeros
// again in the end. Threads beyond heads * groups * kLanes have no keys.
template <class A, int kLanes, bool aligned>
__global__ void __launch_bounds__(kDecodeThreads, 2)
    attention_step_kernel(A* y, float* partial, unsigned* tickets, A* k_cache, A* v_cache, const A* proj,
                          ResidualStream<A> residual, const float* cos, const float* sin, AttentionShape n,
                          const DecodeCursor* cursor, int splits, int heads, int groups) {
    extern __shared__ __align__(16) unsigned char shared[];
    A* ring = reinterpret_cast<A*>(shared);
    float(*joined)[8 * kLanes + 2] = reinterpret_cast<float(*)[8 * kLanes + 2]>(shared);
    const int H = int(n.H), P = int(n.P), block = int(blockIdx.x) / splits, split = int(blockIdx.x) % splits;
    const int b = block / (H / heads), first_head = block % (H / heads) * heads, entry = int(threadIdx.x) / kLanes,
              e = int(threadIdx.x) % kLanes * 8;
    const int shared_by = H / int(n.Hkv), h = first_head + entry % heads, hkv = h / shared_by;
    const int group = entry < heads * groups ? entry / heads : 1 << 30;
    const int past = int(cursor->position), per_split = (past + splits - 1) / splits, first = split * per_split,
              last = min(past, first + per_split), step = groups * kStepKeys;
    A *k = k_cache + b * n.seq_kv + hkv * P, *v = v_cache + b * n.seq_kv + hkv * P;
    const auto row_of = [&](int s, int u) { return min(s + u * groups + group, last - 1) * n.ld_kv; };
    // So many steps lie in the ring or are on their way to it; none if rows are not aligned, which are read when needed.
    constexpr int kStages = aligned ? kRingBytes / (kStepKeys * 16 * int(sizeof(A))) : 0;
    const auto place = [&](int stage, int u) {  // of a key, and then its value
        return ring + ((stage % (kStages > 0 ? kStages : 1) * kStepKeys + u) * 2 * blockDim.x + threadIdx.x) * 8;
    };
    const auto fetch = [&](int s, int stage) {
#pragma unroll
        for (int u = 0; u < kStepKeys && s < last; ++u) {
            fetch_row8(place(stage, u), k + row_of(s, u), e, P);
            fetch_row8(place(stage, u) + blockDim.x * 8, v + row_of(s, u), e, P);
        }
        copies_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) fetch(first + i * step, i);
    const A *q_new = proj + b * n.ld_q + h * P, *k_new = proj + b * n.ld_q + (H + hkv) * P;
    cos += int64(past) * (P / 2);
    sin += int64(past) * (P / 2);
    float q[8];
    load_turned8(q, q_new, e, P, cos, sin);
    for (int c = first_head * P + int(threadIdx.x); c < (first_head + heads) * P && split == 0; c += int(blockDim.x))
        residual.pass_on(b, c, residual.ask(b, c));
    const float rstd = residual.rstd(b);
#pragma unroll
    for (int i = 0; i < 8; ++i) q[i] *= rstd * kLog2e * rsqrtf(float(P));
    OnlineSoftmax mean;
    int stage = 0;
    for (int s = first; s < last; s += step, ++stage) {
        float keys[kStepKeys][8], values[kStepKeys][8], scores[kStepKeys];
        if constexpr (kStages > 0) {
            fetch(s + (kStages - 1) * step, stage + kStages - 1);
            copies_wait<kStages - 1>();
        }
#pragma unroll
        for (int u = 0; u < kStepKeys; ++u) {
            if constexpr (kStages > 0) {
                load<8>(keys[u], place(stage, u));
                load<8>(values[u], place(stage, u) + blockDim.x * 8);
            } else {
                load_row8(keys[u], k + row_of(s, u), e, P);
                load_row8(values[u], v + row_of(s, u), e, P);
            }
            scores[u] = score_of<kLanes>(q, keys[u]);
            if (s + u * groups + group >= last) scores[u] = -INFINITY;
        }
        mean.add(scores, values);
    }
    if (split == splits - 1) {  // the new key and value, which one head of those that share them appends
        float key[1][8], value[1][8];
        load_turned8(key[0], k_new, e, P, cos, sin);
        load_row8(value[0], k_new + n.Hkv * P, e, P);
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            key[0][i] *= rstd;
            value[0][i] *= rstd;
        }
        const float score[1] = {score_of<kLanes>(q, key[0])};
        if (group == 0) {
            mean.add(score, value);
            for (int i = 0; i < 8 && e + i < P && h % shared_by == 0; ++i) {
                k[past * n.ld_kv + e + i] = from_float<A>(key[0][i]);
                v[past * n.ld_kv + e + i] = from_float<A>(value[0][i]);
            }
        }
    }
    __syncthreads();  // the ring has been read: its place is used again
#pragma unroll
    for (int i = 0; i < 8; ++i) joined[entry][e + i] = mean.out[i];
    joined[entry][8 * kLanes] = mean.top;
    joined[entry][8 * kLanes + 1] = mean.sum;
    __syncthreads();  // the groups' sums are there
    for (int i = int(threadIdx.x); i < heads * P; i += int(blockDim.x)) {
        const int head = i / P, c = i % P;
        float top, sum, out;
        join_groups<8 * kLanes>(&out, &top, &sum, joined + head, groups, heads, c, P);
        float* to = partial + (int64(b * H + first_head + head) * splits + split) * (P + 2);
        to[c] = out;
        if (c > 0) continue;
        to[P] = top;
        to[P + 1] = sum;
    }
    __shared__ bool joins;  // the last block to be done
    __syncthreads();  // the block's part is written; its ticket publishes it, and takes note of those with earlier ones
    if (threadIdx.x == 0) {
        unsigned ticket;
        asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;"
                     : "=r"(ticket)
                     : "l"(tickets + block), "r"(splits - 1)
                     : "memory");
        joins = ticket == unsigned(splits - 1);
    }
    __syncthreads();
    if (!joins) return;
    // Two numbers of a head's result, many parts at a time: nothing else is left to do while they are on their way.
    for (int i = int(threadIdx.x); i < heads * P / 2; i += int(blockDim.x)) {
        const float2* part =
            reinterpret_cast<const float2*>(partial + int64(b * H + first_head + i / (P / 2)) * splits * (P + 2));
        float top = -1e30f, sum = 0, out[2] = {};
        for (int s0 = 0; s0 < splits; s0 += kJoined) {
            float2 x[kJoined], weight[kJoined];
#pragma unroll
            for (int u = 0; u < kJoined; ++u) {
                const int at = min(s0 + u, splits - 1) * (P / 2 + 1);
                x[u] = __ldcg(part + at + i % (P / 2));
                weight[u] = __ldcg(part + at + P / 2);
            }
            float new_top = top;
#pragma unroll
            for (int u = 0; u < kJoined; ++u) new_top = fmaxf(new_top, weight[u].x);
            const float shrink = exp2_fast(top - new_top);
            top = new_top;
            sum *= shrink;
            out[0] *= shrink;
            out[1] *= shrink;
#pragma unroll
            for (int u = 0; u < kJoined; ++u) {
                const float scale = s0 + u < splits ? exp2_fast(weight[u].x - top) : 0.0f;
                sum += scale * weight[u].y;
                out[0] += scale * x[u].x;
                out[1] += scale * x[u].y;
            }
        }
        store2(y + int64(b * H + first_head) * P + 2 * i, out[0] / sum, out[1] / sum);
    }
}
// proj: rows q | k | v before RoPE, not multiplied by rstd yet, n.ld_q apart; the caches' rows are n.ld_kv apart. n.T is 1.
template <class A>
static void attention_step(A* y, float* partial, unsigned* tickets, A* k_cache, A* v_cache, const A* proj,
                           const ResidualStream<A>& residual, const float* cos, const float* sin,
                           const AttentionShape& n, const DecodeCursor* cursor, int64 splits, cudaStream_t stream) {
    const int lanes = attention_lanes(n.P), heads = int(attention_heads(n.H, n.P)),
              groups = std::max(1, kDecodeThreads / (heads * lanes)),
              threads = int(round_up(heads * groups * lanes, 32));
    // What comes after the ring, in its place, takes less than 64 bytes a thread.
    const size_t bytes = size_t(threads * (n.P % 8 == 0 ? kRingBytes : 64));
    const auto go = [&](auto kernel) {
        launch("attention_step", kernel, n.B * (n.H / heads) * splits, threads, bytes, stream, y, partial, tickets,
               k_cache, v_cache, proj, residual, cos, sin, n, cursor, int(splits), heads, groups);
    };
    if (n.P % 8 != 0) go(attention_step_kernel<A, 16, false>);
    else if (n.P > 64) go(attention_step_kernel<A, 16, true>);
    else go(attention_step_kernel<A, 8, true>);
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
// best (B), zeros before; logits in rows ld apart, a multiple of 8. `parts` blocks share a sequence.
__global__ void __launch_bounds__(256)
    best_logit_kernel(Ranked* best, const float* logits, int64 vocab, int64 ld, int64 parts) {
    const int64 b = blockIdx.x / parts;
    Ranked top = 0;
#pragma unroll 4
    for (int64 i = (blockIdx.x % parts * 256 + threadIdx.x) * 4; i < vocab; i += parts * 1024) {
        float z[4];
        load<4>(z, logits + b * ld + i);
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if (i + k < vocab) top = max(top, ranked(z[k], i + k));
    }
    top = warp_max(top);
    if (lane_id() == 0) atomicMax(best + b, top);
}
static void best_logit(Ranked* best, const float* logits, int64 B, int64 vocab, int64 ld, cudaStream_t stream) {
    const int64 parts = std::min(ceil_div(vocab, 4096), ceil_div(1056, B));  // four loads a thread, or more
    launch("best_logit", best_logit_kernel, B * parts, 256, 0, stream, best, logits, vocab, ld, parts);
}
__device__ inline int32_t token_of(Ranked best) { return int32_t(~0u - uint32_t(best)); }
// As the host is told; -1 - token: its logit is not a finite number (NaN or +inf; the best is -inf).
__device__ inline int32_t reported(Ranked best) {
    const uint32_t key = uint32_t(best >> 32);
    return key == ~0u || key == 0x007FFFFFu ? -1 - token_of(best) : token_of(best);
}
// Ends a step: the tokens chosen are the next step's input, and are kept as entry cursor->made of `chosen` (steps,B); best
// is zero again. One block.
__global__ void choose_kernel(int32_t* tokens, int32_t* chosen, DecodeCursor* cursor, Ranked* best, int64 B) {
    const int64 made = cursor->made;
    for (int64 b = threadIdx.x; b < B; b += blockDim.x) {
        tokens[b] = token_of(best[b]);
        chosen[made * B + b] = reported(best[b]);
        best[b] = 0;
    }
    __syncthreads();  // all have read the cursor
    if (threadIdx.x > 0) return;
    ++cursor->position;
    ++cursor->made;
}

// ---- A whole token in one kernel ----------------------------------------------------------------------------------------
// With a few sequences a layer's weights pass in a few microseconds, and the pauses between kernels would take longer than
// that. So one kernel makes whole tokens, as many as are wanted. It has one block per multiprocessor, all of them running
// at once (a cooperative launch), and every block owns the same share of the rows of every matrix, within six of them.
// Compute capability 9.0.
//
// WEIGHTS. A block's rows of the four matrices of one layer fit into its shared memory. One warp does nothing but copy: as
// soon as a matrix has been used, the next layer's follows in its place, so that memory never waits for arithmetic. But
// only kWindow pieces are under way at once: with more, they queue up in front of the memory, and the activations
// behind them. The other 8 warps own 1/8 of the columns each and multiply them (tensor cores); the 8 parts of a sum are
// added in a fixed order. What decides is the time from the last word to the next one sent: so a warp has its weights in
// registers, and knows where its sums go, before the activations are there.
//
// ONE LOOP goes through all matrices: the code of a layer, written out, would be larger than the caches for instructions.
// And nothing may be spilled: beside so much shared memory there is hardly a cache for it. Hence so much in TokenControl,
// and the launch has three warps more than it needs: registers move between groups of four warps, and the copying warp's
// group leaves 232 to each thread of the others.
//
// ACTIVATIONS pass from block to block through memory in words of 16 bytes: six bf16 numbers (a unit: what a block owns
// comes in sixes) and a tag that is new in each layer of each step. Such a word is written and read as one, so that whoever
// finds the tag has the numbers, and no barrier is needed. Each word is written kTokenCopies times, for different readers,
// since a place in the L2 cache that all ask for is slow. Nothing is overwritten too early: every block owns some of proj
// and of h, and all words in the same place a layer later depend on those. Nor too late: a word is always written by the
// same thread.
//
// Per layer five exchanges: x -> projection -> y -> x_mid -> h -> x; attention has one more, between splits and y. After
// the last layer one more yields the token, which begins the next step. `320m`, one sequence: 45% of the speed of a copy on
// an H200, 62% on an H100.

struct Word {
    uint32_t a, b, c, tag;
};
__device__ inline void send(Word* to, uint32_t a, uint32_t b, uint32_t c, uint32_t tag) {
    asm volatile(
        "{\n.reg .b64 lo, hi;\n.reg .b128 w;\nmov.b64 lo, {%1, %2};\nmov.b64 hi, {%3, %4};\nmov.b128 w, {lo, hi};\n"
        "st.relaxed.gpu.global.b128 [%0], w;\n}" ::"l"(to),
        "r"(a), "r"(b), "r"(c), "r"(tag)
        : "memory");
}
// All four numbers must be used by whoever reads them: ptxas splits a load of 128 bits whose numbers are not, and then the
// tag and the others come from different moments.
__device__ inline Word peek(const Word* from) {
    Word w;
    asm volatile(
        "{\n.reg .b64 lo, hi;\n.reg .b128 w;\nld.relaxed.gpu.global.b128 w, [%4];\nmov.b128 {lo, hi}, w;\n"
        "mov.b64 {%0, %1}, lo;\nmov.b64 {%2, %3}, hi;\n}"
        : "=r"(w.a), "=r"(w.b), "=r"(w.c), "=r"(w.tag)
        : "l"(from)
        : "memory");
    return w;
}
// Several, whichever is missing asked for again; null: none.
template <int K>
__device__ inline void receive(Word (&w)[K], const Word* const (&from)[K], uint32_t tag) {
    bool missing;
#pragma unroll
    for (int i = 0; i < K; ++i) w[i].tag = from[i] ? ~tag : tag;
    do {
        missing = false;
#pragma unroll
        for (int i = 0; i < K; ++i)
            if (w[i].tag != tag) {
                w[i] = peek(from[i]);
                missing = true;
            }
    } while (missing);
}
__device__ inline Word receive(const Word* from, uint32_t tag) {
    Word w[1];
    receive(w, {from}, tag);
    return w[0];
}
__device__ inline void keep(uint32_t* to, const Word& w) {
    to[0] = w.a;
    to[1] = w.b;
    to[2] = w.c;
}
__device__ inline void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

__device__ inline void copy_bytes(void* to, const void* from, int bytes, uint64_t* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}
static constexpr int kTokenWarps = 8, kTokenThreads = 32 * kTokenWarps, kTokenLaunch = kTokenThreads + 128;
static constexpr int kTokenSequences = 8, kTokenCopies = 4, kTokenBarriers = 64;
static constexpr int kTokenTiles = 3, kTokenSteps = 6;              // what a warp holds of a matrix, 16 x 16 each
static constexpr int kTokenZeros = 32 * kTokenTiles * kTokenSteps;  // bytes
static constexpr int kSumRow = kTokenWarps + 4;  // numbers from sum to sum, so that they lie in different banks
// Words that a unit of y is made of, in shared memory as 12 bytes each; that q, k or v of a head is.
static constexpr int kTokenStage = 96, kTokenVector = 24;
static_assert(kTokenCopies <= 6, "each of a unit's six lanes sends one");

struct TokenLayer {  // where a layer's parameters and state lie
    const bf16 *in, *out, *gate_up, *down;
    const float *norm1, *norm2, *res1, *res2, *dt_bias, *A_log;
    float* S;  // null: attention
    bf16 *k, *v;
};
struct TokenPlan {
    int B, D, F, L, H, Hkv, P, N, V, splits, blocks;
    int in_width[2];  // of an SSD layer, of an attention layer
    int64 capacity;
    float eps, inverse_d;
    bool decay;
    int units = 0;  // of attention, for a block at most
    int most = 0;   // kMost of the kernel: sequences, or these units, at most
    // Words: kTokenCopies times x | y | mid | h, which the products read (x twice: the head does, too), and the projections
    // of both kinds of layer, whose writers differ; then best and partial
    int from_at[5] = {}, proj_at[2] = {}, copy_words = 0, best_at = 0, partial_at = 0;
    int64 words = 0;
    // Shared memory in bytes: control | the layers | in, out, gate_up, down | zeros | activations (B,K), behind them the
    // warps' sums, and scratch behind those of in and of out; h, if it is longer, lies in the place of the sums before
    int row_d = 0, row_f = 0;  // from row to row of a matrix or of activations: D or F numbers, and 16 bytes more
    int matrix_at[5] = {};     // within the weights
    int slots = 0;             // tiles of the head, five units each, that fit in their place
    int weights_at = 0, zeros_at = 0, x_at = 0, scratch_at = 0, shared = 0;
};
struct TokenArgs {
    const TokenLayer* layers;
    const float *embed, *final_norm, *cos_qk, *sin_qk, *cos_cb, *sin_cb;
    const bf16* head;
    int32_t *tokens, *chosen;
    DecodeCursor* cursor;
    float* logits;
    Word* words;
    int vocab, steps;
    uint32_t tag;  // of the first step's embeddings; layer i's is i + 1 more
};
struct Share {
    int first, count;
};
struct TokenUnit {  // of attention: a split of a head
    int b, h, hkv, split;
};
// What a block's warps share; also what each could keep for itself, if registers were not short.
struct TokenControl {
    uint64_t arrived[kTokenBarriers];  // piece p of the weights: barrier p % kTokenBarriers
    Ranked best[kTokenSequences];
    Share in[2], own, own_h, head;  // units of the projections (SSD, attention), of x, of h, of the logits
    struct {
        int b, unit, row, head;
    } y[kTokenWarps];  // of which unit, or two rows of it, a warp makes y; b < 0: none
    uint32_t pairs[kTokenWarps];
    Share attention;
    TokenUnit attention_units[kTokenSequences];
    alignas(16) float squares[kTokenSequences][kTokenWarps];  // of each sequence, by the warps that read it; else zeros
    int32_t tokens[kTokenSequences];
    int used;  // matrices and tiles whose place is free again
};

__host__ __device__ inline Share share_of(int units, int block, int blocks) {
    const int most = units / blocks, rest = units % blocks;
    return {most * block + (block < rest ? block : rest), most + (block < rest)};
}
__host__ __device__ inline int sixes(int numbers) { return (numbers + 5) / 6; }
static bool plan_token(TokenPlan* t, const Config& c, int64 B, int64 capacity, int blocks, int64 shared_limit) {
    const bool fits = B >= 1 && B <= kTokenSequences && c.D % 256 == 0 && c.F % 256 == 0 && c.N % 4 == 0 &&
                      c.N <= 128 && c.P() % 16 == 0 && c.P() <= 128 && c.V < (1 << 30) && c.D <= 4096 && c.F <= 16384;
    if (!fits) return false;
    *t = {
        int(B),     int(c.D),          int(c.F),       int(c.L),   int(c.H), int(c.Hkv),
        int(c.P()), int(c.N),          int(c.V),       0,          blocks,   {int(c.ssd_width()), int(c.attn_width())},
        capacity,   float(c.norm_eps), 1 / float(c.D), c.ssd_decay};
    // Every block has units of h and of every projection, or it could be left behind. Splits are for 132 multiprocessors,
    // whatever the GPU, and so is the order of attention's sums.
    const int enough = std::min({sixes(t->F), sixes(t->in_width[0]), sixes(t->in_width[1])});
    blocks = t->blocks = std::min(blocks, enough);
    t->splits = int(std::max<int64>(1, std::min<int64>({std::min(132, enough) / c.H, 32, ceil_div(capacity, 32)})));
    t->units = int(ceil_div(B * c.H * t->splits, blocks));

    const auto most = [&](int numbers) { return int(ceil_div(sixes(numbers), blocks)); };
    const int in_units = most(std::max(t->in_width[0], t->in_width[1])), d_units = most(t->D), h_units = most(t->F);
    const int rows[4] = {6 * in_units, 6 * d_units, 12 * h_units, 6 * d_units};
    t->row_d = 2 * t->D + 16;
    t->row_f = 2 * t->F + 16;
    const int pieces[4] = {in_units, d_units, 2 * h_units, d_units * int(ceil_div(c.F, c.D))};
    for (int i = 0; i < 4; ++i) t->matrix_at[i + 1] = t->matrix_at[i] + rows[i] * (i == 3 ? t->row_f : t->row_d);
    const int tile = 30 * t->row_d, weights = std::max(t->matrix_at[4], 2 * tile);
    t->slots = weights / tile;
    const int all_pieces = pieces[0] + pieces[1] + pieces[2] + pieces[3] + 5 * t->slots;
    if (*std::max_element(rows, rows + 4) > 16 * kTokenTiles || std::max(in_units, h_units) * B > 5 * kTokenWarps ||
        d_units * B > kTokenWarps || t->units > kTokenSequences || all_pieces > kTokenBarriers ||
        *std::max_element(pieces, pieces + 4) > 32)
        return false;

    const int d_words = int(B) * sixes(t->D);
    t->from_at[1] = d_words;
    t->from_at[2] = 2 * d_words;
    t->from_at[3] = 3 * d_words;
    int at = t->proj_at[0] = 3 * d_words + int(B) * sixes(t->F);
    at = t->proj_at[1] = at + int(B) * sixes(t->in_width[0]);
    // From copy to copy an odd multiple of 16 KB: with one sequence up to 4% faster than other distances (docs/experiments.md).
    t->copy_words = at = int(round_up(at + int(B) * sixes(t->in_width[1]), 2048)) + 1024;
    t->best_at = at *= kTokenCopies;
    t->partial_at = at += int(B) * blocks;
    t->words = at + B * c.H * t->splits * c.P() / 2;

    const int lanes = c.P() > 64 ? 16 : 8, b = int(B);
    t->most = std::max(b, t->units) <= 2 && 3 * d_units * b <= kTokenWarps ? 2 : std::max(b, t->units) <= 4 ? 4 : 8;
    const int of_attention = t->units * (kTokenWarps * (8 * lanes + 2) * 4 + 3 * kTokenVector * 12);
    const auto sums = [&](int kind) { return 4 * kSumRow * b * rows[kind]; };
    t->weights_at = int(round_up(int64(sizeof(TokenControl) + sizeof(TokenLayer) * size_t(c.L)), 128));
    t->zeros_at = t->weights_at + weights;
    t->x_at = t->zeros_at + kTokenZeros;
    t->scratch_at = t->x_at + b * t->row_d + std::max(sums(0), sums(1));
    t->shared = std::max({t->scratch_at + std::max(kTokenWarps * kTokenStage * 12, of_attention),
                          t->x_at + b * t->row_d + std::max(sums(2), 4 * kSumRow * b * 30),
                          t->x_at + b * std::max(t->row_d, t->row_f) + sums(3)});
    return t->shared <= shared_limit;
}

// Of the warps that multiply.
__device__ inline void token_barrier() { asm volatile("bar.sync 1, %0;" ::"n"(kTokenThreads) : "memory"); }

// A layer's attention, unit by unit; every warp has an eighth of the keys of each. The next keys and values are asked for
// while these are used. The last split also takes the new key and value, and appends them.
template <int kLanes, int kMost>
__device__ inline void token_attention(const TokenPlan& n, const TokenArgs& g, const TokenLayer& l,
                                       const TokenControl& control, unsigned char* scratch, const Word* proj, int past,
                                       uint32_t tag) {
    constexpr int kKeys = 6, kGroups = kTokenThreads / kLanes, kWords = kMost * 3 * kTokenVector / kTokenThreads + 1;
    const int thread = int(threadIdx.x), warp = thread / 32, lane = lane_id(), e = lane % kLanes * 8;
    const int kv_row = n.Hkv * n.P, half = n.P / 2;
    const bool has_numbers = e < n.P;
    float(*joined)[8 * kLanes + 2] = reinterpret_cast<float(*)[8 * kLanes + 2]>(scratch);  // (units,warps)
    uint32_t* stage = reinterpret_cast<uint32_t*>(joined + n.units * kTokenWarps);         // (units,3) words of q, k, v
    const int per_split = (past + n.splits - 1) / n.splits,
              steps = max(1, (per_split + kGroups * kKeys - 1) / (kGroups * kKeys));
    const Share mine = control.attention;
    const auto cache_of = [&](const TokenUnit& it) { return (int64(it.b) * n.capacity * n.Hkv + it.hkv) * n.P; };
    uint4 keys[kKeys], values[kKeys];
    const auto fetch = [&](uint4(&to)[kKeys], const bf16* cache, const TokenUnit& it, int step) {
        const int first = it.split * per_split + step * kKeys * kGroups + thread / kLanes,
                  last = max(min(past, (it.split + 1) * per_split) - 1, 0);
        cache += cache_of(it) + e;
#pragma unroll
        for (int k = 0; k < kKeys; ++k) {
            to[k] = {};
            if (has_numbers)
                to[k] = *reinterpret_cast<const uint4*>(cache + int64(min(first + k * kGroups, last)) * kv_row);
        }
    };
    const auto numbers_of = [](float(&f)[8], const uint4& x) {
        f[0] = low_half(x.x), f[1] = high_half(x.x), f[2] = low_half(x.y), f[3] = high_half(x.y);
        f[4] = low_half(x.z), f[5] = high_half(x.z), f[6] = low_half(x.w), f[7] = high_half(x.w);
    };
    float turn_c[8] = {}, turn_s[8] = {};
    if (has_numbers) {
        const int64 at = int64(past) * half + (e < half ? e : e - half);
        load<8>(turn_c, g.cos_qk + at);
        load<8>(turn_s, g.sin_qk + at);
    }
    // This lane's numbers of a vector, and those that RoPE turns them with.
    const auto turned = [&](float(&f)[8], const uint32_t* vector, int at) {
        const uint32_t* own = vector + (at % 6 + e) / 2;
        const uint32_t* other = own + (e < half ? half : -half) / 2;
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
            const uint32_t x = has_numbers ? own[i / 2] : 0,
                           y = has_numbers ? other[i / 2] ^ (e < half ? 0x80008000u : 0u) : 0;
            f[i] = low_half(x) * turn_c[i] + low_half(y) * turn_s[i];
            f[i + 1] = high_half(x) * turn_c[i + 1] + high_half(y) * turn_s[i + 1];
        }
    };
    {  // q, k and v of all units
        const Word* where[kWords];
        Word w[kWords];
#pragma unroll
        for (int k = 0; k < kWords; ++k) {
            const int i = k * kTokenThreads + thread, vector = i / kTokenVector, unit = vector / 3, which = vector % 3,
                      word = i % kTokenVector;
            where[k] = nullptr;
            if (unit >= mine.count) continue;
            const TokenUnit of = control.attention_units[unit];
            const int at = (which == 0 ? of.h : n.H + (which - 1) * n.Hkv + of.hkv) * n.P;
            if (at / 6 + word <= (at + n.P - 1) / 6 && (which == 0 || of.split == n.splits - 1))
                where[k] = proj + of.b * sixes(n.in_width[1]) + at / 6 + word;
        }
        receive(w, where, tag);
#pragma unroll
        for (int k = 0; k < kWords; ++k)
            if (where[k]) keep(stage + 3 * (k * kTokenThreads + thread), w[k]);
    }
    TokenUnit it = control.attention_units[0];
    fetch(keys, l.k, it, 0);
    token_barrier();            // q, k and v are there
    fetch(values, l.v, it, 0);  // not before: a warp that waits for memory to take what it asks for would come late
#pragma unroll 1
    for (int unit = 0; unit < mine.count; ++unit) {
        const uint32_t* vectors = stage + unit * 3 * 3 * kTokenVector;
        const int at_k = (n.H + it.hkv) * n.P, at_v = at_k + n.Hkv * n.P;
        const int first = it.split * per_split + thread / kLanes, end = min(past, (it.split + 1) * per_split);
        float q[8];
        turned(q, vectors, it.h * n.P);
#pragma unroll
        for (int i = 0; i < 8; ++i) q[i] *= kLog2e * rsqrtf(float(n.P));
        OnlineSoftmax mean;
        TokenUnit next = it;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
            const bool ends = step + 1 == steps;
            if (ends) next = control.attention_units[min(unit + 1, mine.count - 1)];
            float scores[kKeys], v[kKeys][8];
#pragma unroll
            for (int k = 0; k < kKeys; ++k) {
                float key[8];
                numbers_of(key, keys[k]);
                scores[k] = score_of<kLanes>(q, key);
                if (first + (step * kKeys + k) * kGroups >= end) scores[k] = -INFINITY;
                numbers_of(v[k], values[k]);
            }
            const bool more = !ends || unit + 1 < mine.count;
            if (more) fetch(keys, l.k, next, ends ? 0 : step + 1);
            mean.add(scores, v);
            if (more) fetch(values, l.v, next, ends ? 0 : step + 1);
        }
        if (warp == 0 && it.split == n.splits - 1) {
            float key[1][8], value[1][8];
            turned(key[0], vectors + 3 * kTokenVector, at_k);
            load_row8(value[0], reinterpret_cast<const bf16*>(vectors + 6 * kTokenVector) + at_v % 6, e, n.P);
            const float score[1] = {score_of<kLanes>(q, key[0])};
            if (lane < kLanes) {
                mean.add(score, value);
                const int64 at = (int64(it.b) * n.capacity + past) * kv_row + it.hkv * n.P + e;
                if (has_numbers && it.h % (n.H / n.Hkv) == 0) {
                    store<8>(l.k + at, key[0]);
                    store<8>(l.v + at, value[0]);
                }
            }
        }
        mean.template merge<kLanes>();
        if (lane < kLanes) {
            float* to = joined[unit * kTokenWarps + warp];
#pragma unroll
            for (int i = 0; i < 8; ++i) to[e + i] = mean.out[i];
            to[8 * kLanes] = mean.top;
            to[8 * kLanes + 1] = mean.sum;
        }
        it = next;
    }
    token_barrier();  // the warps' sums are there
    // Two means and the logarithm of their weight.
    for (int i = thread; i < mine.count * half; i += kTokenThreads) {
        const int unit = i / half, pair = i % half;
        float out[2], top, sum;
#pragma unroll
        for (int k = 0; k < 2; ++k)
            join_groups<8 * kLanes>(&out[k], &top, &sum, joined + unit * kTokenWarps, kTokenWarps, 1, 2 * pair + k,
                                    n.P);
        const float inverse = sum > 0 ? 1 / sum : 0.0f;
        send(g.words + n.partial_at + int64(mine.first) * half + i, __float_as_uint(out[0] * inverse),
             __float_as_uint(out[1] * inverse), __float_as_uint(sum > 0 ? top + __log2f(sum) : -1e30f), tag);
    }
    token_barrier();  // they have been read
}

// kLanes: lanes that share a key of attention, 8 of its P numbers each.
// kMost: sequences at most, and units of attention. Instructions are what counts with one or two: there a lane has fewer
// words under way, and three warps make a unit of y.
template <int kLanes, int kMost>
__global__ void __launch_bounds__(kTokenLaunch, 1)
    token_kernel(const __grid_constant__ TokenPlan n, const __grid_constant__ TokenArgs g) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) && CUDART_VERSION >= 12030  // the first that knows 128-bit words
    extern __shared__ __align__(16) unsigned char shared[];
    TokenControl& control = *reinterpret_cast<TokenControl*>(shared);
    TokenLayer* layers = reinterpret_cast<TokenLayer*>(shared + sizeof(TokenControl));
    volatile int* used = &control.used;
    constexpr int kPairs = kMost > 2 ? 3 : 1, kMakers = 3 / kPairs;  // of rows that a warp makes of y; warps for a unit
    int thread = int(threadIdx.x), warp = thread / 32, lane = lane_id();
    const int block = int(blockIdx.x), B = n.B;
    unsigned char *weights = shared + n.weights_at, *act = shared + n.x_at, *scratch = shared + n.scratch_at;
    const int tile_bytes = 30 * n.row_d;

    for (int i = thread; i < n.L * int(sizeof(TokenLayer) / 8); i += kTokenLaunch)
        reinterpret_cast<uint64_t*>(layers)[i] = reinterpret_cast<const uint64_t*>(g.layers)[i];
    for (int i = thread; i < kTokenZeros / 4; i += kTokenLaunch)
        reinterpret_cast<uint32_t*>(shared + n.zeros_at)[i] = 0;
    if (thread < kTokenBarriers) init_barrier(shared_address(control.arrived + thread), 1);
    if (thread < kTokenSequences * kTokenWarps) control.squares[thread / kTokenWarps][thread % kTokenWarps] = 0;
    if (thread < B) control.tokens[thread] = g.tokens[thread];
    if (thread == 0) {
        *used = 0;
        for (int k = 0; k < 2; ++k) control.in[k] = share_of(sixes(n.in_width[k]), block, n.blocks);
        control.own = share_of(sixes(n.D), block, n.blocks);
        control.own_h = share_of(sixes(n.F), block, n.blocks);
        control.head = share_of(sixes(n.V), block, n.blocks);
        for (int w = 0; w < kTokenWarps; ++w) {
            const int count = control.own.count, item = w / kMakers, unit = control.own.first + item % max(count, 1),
                      row = min(6 * unit + w % kMakers * 2, n.D - 2);
            control.y[w] = {item < count * B ? item / count : -1, unit, row, row / n.P};
        }
        control.attention = share_of(B * n.H * n.splits, block, n.blocks);
        for (int i = 0; i < n.units; ++i) {
            const int u = min(control.attention.first + i, B * n.H * n.splits - 1), h = u / n.splits % n.H;
            control.attention_units[i] = {u / n.splits / n.H, h, h / (n.H / n.Hkv), u % n.splits};
        }
    }

    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the barriers, for the copies
    __syncthreads();                                              // the last one with all warps

    if (warp >= kTokenWarps) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp > kTokenWarps) return;  // only here for their registers
        // ---- The copying warp: matrices and tiles in the order of their use, a lane per row
        const Share own = control.own, own_h = control.own_h, head = control.head;
        const int tiles = (head.count + 4) / 5;
        constexpr int kWindow = 2, kHeadWindow = 5;  // pieces under way at most; with the head no activations pass
        int window = kWindow, pieces = 0, base = 0;  // pieces begun; matrices and tiles of the steps before
        const auto room = [&](int need) {
            while (*used < need) {
            }
            __syncwarp();
        };
        // `units` times six rows of K numbers, in pieces of at most D columns.
        const auto copy_units = [&](unsigned char* to, int units, int K, auto source) {
#pragma unroll 1
            for (int u = 0; u < units; ++u, to += 6 * (2 * K + 16))
#pragma unroll 1
                for (int c = 0; c < K; c += n.D, ++pieces) {
                    const int before = pieces - window, bytes = 2 * min(n.D, K - c);
                    if (before >= 0) await(control.arrived + before % kTokenBarriers, before / kTokenBarriers);
                    uint64_t* barrier = control.arrived + pieces % kTokenBarriers;
                    if (lane == 0) expect_bytes(barrier, 6 * bytes);
                    __syncwarp();  // it knows what to expect
                    if (lane < 6) copy_bytes(to + lane * (2 * K + 16) + 2 * c, source(u) + c, bytes, barrier);
                }
        };
        // How many must have been used before matrix `kind` of the first layer may replace tiles of the step before.
        const auto tiles_before = [&](int kind) {
            int need = 0;
            for (int s = n.matrix_at[kind] / tile_bytes; s < n.slots && s * tile_bytes < n.matrix_at[kind + 1]; ++s)
                if (s < tiles) need = max(need, s + (tiles - 1 - s) / n.slots * n.slots + 1);
            return need;
        };
        for (int step = 0; step < g.steps; ++step) {
            for (int i = 0; i < n.L; ++i) {
                const TokenLayer& l = layers[i];
                const float* small = block == 0 ? l.norm1 : block == 1 ? l.norm2 : block == 2 ? l.res1 : l.res2;
                for (int c = 32 * lane; c < n.D && block < 4; c += 1024) prefetch(small + c);
                if (block == 4 && l.S && lane < 2) prefetch(lane ? l.dt_bias : l.A_log);
                const Share in = control.in[l.S ? 0 : 1];
                const int width = n.in_width[l.S ? 0 : 1];
                for (int kind = 0; kind < 4; ++kind) {
                    if (i > 0) room(base + 4 * (i - 1) + kind + 1);
                    else if (step > 0) room(base - tiles + tiles_before(kind));
                    unsigned char* to = weights + n.matrix_at[kind];
                    // this lane's row of unit u
                    if (kind == 0)
                        copy_units(to, in.count, n.D, [&](int u) {
                            return l.in + int64(min(6 * (in.first + u) + lane, width - 1)) * n.D;
                        });
                    else if (kind == 2)  // six rows of gate, six of up, ...
                        copy_units(to, 2 * own_h.count, n.D, [&](int u) {
                            const int row = min(6 * (own_h.first + u / 2) + lane, n.F - 1);
                            return l.gate_up + int64(u % 2 ? n.F + row : row) * n.D;
                        });
                    else
                        copy_units(to, own.count, kind == 1 ? n.D : n.F, [&](int u) {
                            const int row = min(6 * (own.first + u) + lane, n.D - 1);
                            return kind == 1 ? l.out + int64(row) * n.D : l.down + int64(row) * n.F;
                        });
                    if (kind == 0 && l.S)  // this block's rows of the states
                        for (int b = 0; b < B; ++b)
                            for (int c = 32 * lane; c < 6 * own.count * n.N && 6 * own.first * n.N + c < n.D * n.N;
                                 c += 1024)
                                prefetch(l.S + (int64(b) * n.D + 6 * own.first) * n.N + c);
                }
            }
            base += 4 * n.L;
            window = kHeadWindow;
            for (int t = 0; t < tiles; ++t) {
                const int end = (t + 1) * tile_bytes;  // of its place, which the last layer's matrices left
                const int kind = end <= n.matrix_at[1] ? 0 : end <= n.matrix_at[2] ? 1 : end <= n.matrix_at[3] ? 2 : 3;
                room(t < n.slots ? base - 3 + kind : base + t - n.slots + 1);
                copy_units(weights + t % n.slots * tile_bytes, min(5, head.count - 5 * t), n.D, [&](int u) {
                    return g.head + int64(min(6 * (head.first + 5 * t + u) + lane, n.V - 1)) * n.D;
                });
            }
            base += tiles;
            window = kWindow;
        }
        return;
    }

    // ---- The other warps
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    const Word* mail = g.words + block % kTokenCopies * n.copy_words;  // what this block reads
    int past = int(g.cursor->position);
    uint32_t tag0 = g.tag;
    int pieces = 0;  // pieces of weights waited for

    // Activations of all sequences, words at mail + at, into shared memory. With a norm's weights: x * weight; returned is
    // this thread's part of the sum of squares.
    const int readers = kTokenWarps / B, reader = warp / B, read_b = warp % B;  // warps are dealt out to the sequences
    const auto gather = [&](int K, const float* weight, int at, uint32_t tag) {
        constexpr int kAt = kMost > 2 ? 4 : 2;  // at a time
        float square = 0;
        const int words = reader < readers ? sixes(K) : 0, step = 32 * readers;
        const Word* from = mail + at + read_b * words;
#pragma unroll 1
        for (int w0 = reader * 32 + lane; w0 < words; w0 += kAt * step) {
            float2 scale[kAt][3] = {};
            Word word[kAt];
            const Word* where[kAt];
#pragma unroll
            for (int k = 0; k < kAt; ++k) {
                const int w = w0 + k * step;
                where[k] = w < words ? from + w : nullptr;
#pragma unroll
                for (int j = 0; j < 3; ++j)
                    if (weight && 6 * w + 2 * j < K) scale[k][j] = reinterpret_cast<const float2*>(weight)[3 * w + j];
            }
            receive(word, where, tag);
#pragma unroll
            for (int k = 0; k < kAt; ++k) {
                const int w = w0 + k * step;
                if (w >= words) break;
                uint32_t pairs[3] = {word[k].a, word[k].b, word[k].c};
                if (weight)
#pragma unroll
                    for (int j = 0; j < 3; ++j) {
                        const float x0 = low_half(pairs[j]), x1 = high_half(pairs[j]);
                        if (6 * w + 2 * j < K) square += x0 * x0 + x1 * x1;
                        pairs[j] = pack(x0 * scale[k][j].x, x1 * scale[k][j].y);
                    }
                keep(reinterpret_cast<uint32_t*>(act + read_b * (2 * K + 16)) + 3 * w,
                     {pairs[0], pairs[1], pairs[2], 0});
            }
        }
        return square;
    };
    // A product takes this warp's columns of up to 48 rows in tiles of 16 x 16; if kMost is up to 4, those of up to 8 rows
    // twice, the second half of the columns below the first. A warp loads kTokenTiles x kTokenSteps of them before the
    // activations are there: tile (t,u) begins 16 u after column tile_column(t), of `columns`, and only exists below that. Up
    // to 16 rows are one tile high: the others are further columns.
    using Tiles = uint32_t[kTokenTiles][kTokenSteps][4];
    using Sums = float[kTokenTiles][2][4];
    constexpr bool few = kMost <= 4;
    const auto twice = [](int rows) { return rows <= 8 && few; };
    const auto flat = [](int rows) { return rows <= 16; };
    const auto columns = [&](int rows, int K) { return rows > 0 ? K / kTokenWarps >> twice(rows) : 0; };
    const auto tile_column = [&](int t, int rows) {
        return flat(rows) ? 16 * kTokenSteps * t : 16 * t < rows ? 0 : 1 << 20;
    };
    const auto load_weights = [&](Tiles& a, const unsigned char* matrix, int rows, int K, int k0) {
        const int width = columns(rows, K), row_bytes = 2 * K + 16;
        matrix += 2 * (K / kTokenWarps * warp + (twice(rows) ? lane / 8 % 2 * width : 0) + lane / 16 * 8 + k0);
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
            const int row = min(twice(rows) ? lane % 8 : (flat(rows) ? 0 : 16 * t) + lane % 16, rows - 1);
            const int at = tile_column(t, rows), left = width - k0 - at;
            const bf16* from = reinterpret_cast<const bf16*>(matrix + row * row_bytes) + at;
#pragma unroll
            for (int u = 0; u < kTokenSteps; ++u)
                if (16 * u < left) load_matrices<false>(a[t][u], from + 16 * u);
        }
    };
    // A column of the other operand is a sequence; if kMost is up to 4, columns 2b and 2b + 1 are the two halves of sequence b.
    // All others are zeros. Where less than 32 columns are left, what is read beyond them is not used.
    const auto multiply_weights = [&](Sums& sum, const Tiles& a, int rows, int K, int k0) {
        const int width = columns(rows, K), b_of = few ? lane % 8 / 2 : lane % 8, half = few ? lane % 2 : 0;
        const bool mine = b_of < B && half <= twice(rows);
        const bf16* x = reinterpret_cast<const bf16*>(mine ? act + b_of * (2 * K + 16) : shared + n.zeros_at) +
                        (mine ? K / kTokenWarps * warp + half * width + lane / 8 * 8 + k0 : 0);
        uint32_t b[kTokenSteps / 2][4] = {};
#pragma unroll
        for (int t = 0; t < kTokenTiles; ++t) {
            const int left = width - k0 - tile_column(t, rows);
            if (t == 0 || flat(rows))
#pragma unroll
                for (int u = 0; u < kTokenSteps; u += 2)
                    if (16 * u < left) load_matrices<false>(b[u / 2], x + 16 * (kTokenSteps * t + u));
#pragma unroll
            for (int u = 0; u < kTokenSteps; ++u)
                if (16 * u < left) mma16816(sum[t][u % 2], a[t][u], b[u / 2][u % 2 * 2], b[u / 2][u % 2 * 2 + 1]);
        }
    };
    // Into shared memory: (B, rows, warps). A lane has row 8 r + lane / 4 of sequence lane % 4, or of two neighbours.
    const auto leave_sums = [&](float* sums, const Sums& sum, int rows) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            if (s == 1 && few) break;
            float part[2 * kTokenTiles];
#pragma unroll
            for (int r = 0; r < 2 * kTokenTiles; ++r)
                part[r] = sum[r / 2][0][r % 2 * 2 + s] + sum[r / 2][1][r % 2 * 2 + s];
            if (flat(rows))
#pragma unroll
                for (int t = 0; t < kTokenTiles; ++t) {
                    const float below = twice(rows) ? sum[t][0][3] + sum[t][1][3] : 0.0f;
                    part[0] += (t ? part[2 * t] : 0.0f) + below;
                    part[1] += t ? part[2 * t + 1] : 0.0f;
                }
            const int b = few ? lane % 4 : lane % 4 * 2 + s;
#pragma unroll
            for (int r = 0; r < 2 * kTokenTiles; ++r)
                if (8 * r + acc_row() < rows && b < B) sums[(b * rows + 8 * r + acc_row()) * kSumRow + warp] = part[r];
        }
    };
    const auto sum_of = [&](const float* parts) {
        float s[4], t[4];
        load<4>(s, parts);
        load<4>(t, parts + 4);
        return ((s[0] + t[0]) + (s[1] + t[1])) + ((s[2] + t[2]) + (s[3] + t[3]));
    };
    const auto rstd = [&](int b) { return rsqrtf(sum_of(control.squares[b]) * n.inverse_d + n.eps); };
    // The units that a block makes of a product are dealt out to groups of six lanes, of the last warps first: unit u of
    // sequence b is number b * stride + u.
    struct Item {
        bool on;
        int b, unit, r;
    };
    const auto item_of = [&](int count, int stride) {
        Item it{lane < 30, 0, (kTokenWarps - 1 - warp) * 5 + lane / 6, lane % 6};
        while (it.unit >= stride && it.b < B - 1) {
            it.unit -= stride;
            ++it.b;
        }
        it.on = it.on && it.unit < count;
        if (!it.on) it.unit = 0;
        return it;
    };
    const auto send_six = [&](int to, const Item& it, float v, uint32_t tag) {
        const uint32_t pair = pack(v, __shfl_down_sync(~0u, v, 1));
        const int first = lane - it.r;
        const uint32_t a = __shfl_sync(~0u, pair, first), b = __shfl_sync(~0u, pair, first + 2),
                       c = __shfl_sync(~0u, pair, first + 4);
        if (it.on && it.r < kTokenCopies) send(g.words + to + it.r * n.copy_words, a, b, c, tag);
    };

    const int half_n = n.N / 2, words_d = sixes(n.D), tiles = (control.head.count + 4) / 5;
    // The residual stream: whose number it is that this lane keeps.
    const auto column_of = [&](const Item& it) {
        const int column = 6 * (control.own.first + it.unit) + it.r;
        return it.on && column < n.D ? column : -1;
    };

#pragma unroll 1
    for (int left = g.steps; left > 0; --left, ++past, tag0 += uint32_t(n.L + 1)) {
        float x_own = 0;
        {
            const Item it = item_of(control.own.count, control.own.count);
            if (column_of(it) >= 0)
                x_own = to_float(from_float<bf16>(g.embed[int64(control.tokens[it.b]) * n.D + column_of(it)]));
            send_six(it.b * words_d + control.own.first + it.unit, it, x_own, tag0);
        }
        Ranked best = 0;

        // One matrix after the other, and the tiles of the head: kind 4.
#pragma unroll 1
        for (int at = 0; at < 4 * n.L + tiles; ++at) {
            // Else the compiler would keep all addresses that it can make of these, in more registers than there are.
            asm volatile("" : "+r"(thread), "+r"(warp), "+r"(lane));
            const int i = min(at / 4, n.L - 1), kind = at < 4 * n.L ? at % 4 : 4, tile = at - 4 * n.L;
            const TokenLayer& l = layers[i];
            const uint32_t tag = tag0 + uint32_t(i) + 1;
            const int words_in = sixes(n.in_width[l.S ? 0 : 1]);
            Share units = kind == 0   ? control.in[l.S ? 0 : 1]
                          : kind == 2 ? control.own_h
                          : kind == 4 ? control.head
                                      : control.own;
            if (kind == 4) units = {units.first + 5 * tile, min(5, units.count - 5 * tile)};
            const int per_unit = kind == 2 ? 12 : 6, rows = per_unit * units.count, K = kind == 3 ? n.F : n.D;
            const float* weight = kind == 0 ? l.norm1 : kind == 2 ? l.norm2 : kind == 4 ? g.final_norm : nullptr;
            // What this lane makes of the product in the end.
            const int stride = kind == 4 ? 5 : units.count;
            const Item it = item_of(units.count, stride);
            const int row = per_unit * it.unit + it.r;
            float* sums = reinterpret_cast<float*>(act + B * (kind == 3 ? max(n.row_d, n.row_f) : n.row_d));
            const float* parts = sums + (it.b * rows + row) * kSumRow;
            const int to = units.first + it.unit +
                           (kind == 0 ? n.proj_at[l.S ? 0 : 1] + it.b * words_in
                                      : n.from_at[(kind + 1) % 4] + it.b * (kind == 2 ? sixes(n.F) : words_d));
            float res = 0;
            if (kind % 2 == 1 && column_of(it) >= 0) res = (kind == 1 ? l.res1 : l.res2)[column_of(it)];
            if (kind == 1) {
                // ---- projection -> y: a unit by one warp, or by three, two rows each
                constexpr int kSpan = kPairs > 1 ? 44 : 24, kWords = (2 * kSpan + 4 + 31) / 32;
                static_assert(32 * kWords <= kTokenStage, "a warp's words fit");
                const int maker = (warp + kTokenWarps / 2) % kTokenWarps, y_b = control.y[maker].b,
                          y_unit = control.y[maker].unit, y_row = control.y[maker].row, y_head = control.y[maker].head;
                const bool makes_y = y_b >= 0;
                uint32_t* stage = reinterpret_cast<uint32_t*>(scratch) + warp * kTokenStage * 3;
                uint32_t y[3] = {};
                if (!l.S) token_attention<kLanes, kMost>(n, g, l, control, scratch, mail + n.proj_at[1], past, tag);
                if (l.S && makes_y) {
                    // A lane has two pairs (j, j + N/2) of each row. What they are made of: words of C and of B, of up to
                    // two heads, of X and of dt; in `stage` six numbers, or three pairs, of each.
                    const bool has_pairs = 2 * lane < half_n;
                    const int own_pair = has_pairs ? lane : 0, hn = n.H * n.N, at_c = y_head * n.N, at_b = hn + at_c,
                              at_x = 2 * hn + y_row, at_dt = 2 * hn + n.D + y_head;
                    const int next = (y_head + 1) * n.P,
                              end = min(y_row + 2 * kPairs, n.D);  // the next head's first row
                    const bool both = kPairs > 1 && next < end;
                    const float2 turn_c = reinterpret_cast<const float2*>(g.cos_cb + int64(past) * half_n)[own_pair],
                                 turn_s = reinterpret_cast<const float2*>(g.sin_cb + int64(past) * half_n)[own_pair];
                    float2* s = reinterpret_cast<float2*>(l.S + (int64(y_b) * n.D + y_row) * n.N) + own_pair;
                    float2 lo[2 * kPairs], hi[2 * kPairs];
#pragma unroll
                    for (int r = 0; r < 2 * kPairs; ++r) {
                        const int at = min(r, end - 1 - y_row) * half_n;
                        lo[r] = s[at];
                        hi[r] = s[at + half_n / 2];
                    }
                    const int more = both ? lane / 16 : 0;  // the upper half of the warp makes the next head's dt
                    const float bias = l.dt_bias[y_head + more], log = l.A_log[y_head + more];
                    const Word *proj = mail + n.proj_at[0] + y_b * words_in, *where[kWords];
                    Word w[kWords];
#pragma unroll
                    for (int k = 0; k < kWords; ++k) {
                        const int i = 32 * k + lane, at = i < kSpan ? at_c : at_b,
                                  word = at / 6 + (i < kSpan ? i : i - kSpan),
                                  last = (at + (both ? 2 : 1) * n.N - 1) / 6;
                        where[k] = proj + (i >= 2 * kSpan + 2 ? (at_dt + (both ? i % 2 : 0)) / 6
                                           : i >= 2 * kSpan   ? (at_x + (i % 2 ? end - 1 - y_row : 0)) / 6
                                                              : word);
                        if (i >= 2 * kSpan + 4 || (i < 2 * kSpan && word > last)) where[k] = nullptr;
                    }
                    receive(w, where, tag);
#pragma unroll
                    for (int k = 0; k < kWords; ++k) keep(stage + 3 * (32 * k + lane), w[k]);
                    __syncwarp();
                    const auto number = [&](int at) {
                        const uint32_t pair = stage[at / 2];
                        return at % 2 ? high_half(pair) : low_half(pair);
                    };
                    const auto turned = [&](float2* to_lo, float2* to_hi, int at) {
                        const uint32_t wl = stage[at], wh = stage[at + half_n / 2];
                        const float l0 = low_half(wl), l1 = high_half(wl), h0 = low_half(wh), h1 = high_half(wh);
                        *to_lo = {l0 * turn_c.x - h0 * turn_s.x, l1 * turn_c.y - h1 * turn_s.y};
                        *to_hi = {h0 * turn_c.x + l0 * turn_s.x, h1 * turn_c.y + l1 * turn_s.y};
                    };
                    const float own_dt = softplus(number(6 * (2 * kSpan + 2 + more) + (at_dt + more) % 6) + bias),
                                own_a = n.decay ? expf(-expf(log) * own_dt) : 1.0f;
                    float2 c_lo, c_hi, b_lo, b_hi;
                    float dt = own_dt, a = own_a, sum[2 * kPairs];
#pragma unroll
                    for (int r = 0; r < 2 * kPairs; ++r) {
                        if (r == 0 || (kPairs > 1 && r % 2 == 0 && y_row + r == next)) {  // a head begins
                            const int skip = (r > 0 ? half_n : 0) + own_pair;
                            turned(&c_lo, &c_hi, at_c % 6 / 2 + skip);
                            turned(&b_lo, &b_hi, 3 * kSpan + at_b % 6 / 2 + skip);
                            if (kPairs > 1) {
                                dt = __shfl_sync(~0u, own_dt, r > 0 ? 16 : 0);
                                a = __shfl_sync(~0u, own_a, r > 0 ? 16 : 0);
                            }
                        }
                        const uint32_t x = stage[6 * kSpan + at_x % 6 / 2 + r / 2];
                        const float dx = dt * (r % 2 ? high_half(x) : low_half(x));
                        lo[r] = {a * lo[r].x + dx * b_lo.x, a * lo[r].y + dx * b_lo.y};
                        hi[r] = {a * hi[r].x + dx * b_hi.x, a * hi[r].y + dx * b_hi.y};
                        sum[r] = lo[r].x * c_lo.x + lo[r].y * c_lo.y + (hi[r].x * c_hi.x + hi[r].y * c_hi.y);
                        if (!has_pairs) sum[r] = 0;
                        // else another warp's rows, and sum is of no use
                        if (has_pairs && 6 * y_unit + maker % kMakers * 2 + r < n.D) {
                            s[r * half_n] = lo[r];
                            s[r * half_n + half_n / 2] = hi[r];
                        }
                    }
#pragma unroll
                    for (int r = 0; r < 2 * kPairs; ++r) sum[r] = warp_sum(sum[r]);
#pragma unroll
                    for (int k = 0; k < kPairs; ++k) y[k] = pack(sum[2 * k], sum[2 * k + 1]);
                } else if (makes_y) {  // lane s has split s
                    const Word* where[kPairs];
                    Word w[kPairs];
#pragma unroll
                    for (int k = 0; k < kPairs; ++k) {
                        const int row = min(y_row + 2 * k, n.D - 2), head = row / n.P;
                        const int64 at = (y_b * n.H + head) * n.splits + min(lane, n.splits - 1);
                        where[k] = g.words + n.partial_at + (at * n.P + row % n.P) / 2;
                    }
                    receive(w, where, tag);
#pragma unroll
                    for (int k = 0; k < kPairs; ++k) {
                        float top = __uint_as_float(w[k].c);
#pragma unroll
                        for (int d = 16; d > 0; d /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, d));
                        const float scale = lane < n.splits ? exp2_fast(__uint_as_float(w[k].c) - top) : 0.0f;
                        const float inverse = 1 / warp_sum(scale), y0 = warp_sum(scale * __uint_as_float(w[k].a)),
                                    y1 = warp_sum(scale * __uint_as_float(w[k].b));
                        y[k] = pack(y0 * inverse, y1 * inverse);
                    }
                }
                if (makes_y) {
                    if (kPairs == 1) {
                        if (lane == 0) control.pairs[maker] = y[0];
                        asm volatile("bar.sync %0, 96;" ::"r"(2 + maker / 3)
                                     : "memory");  // the three warps' pairs are there
#pragma unroll
                        for (int k = 0; k < 3 && maker % kMakers == 0; ++k) y[k] = control.pairs[maker + k];
                    }
                    if (maker % kMakers == 0 && lane < kTokenCopies)
                        send(g.words + lane * n.copy_words + n.from_at[1] + y_b * words_d + y_unit, y[0], y[1], y[2],
                             tag);
                }
            }

            // ---- The weights, into registers, and then the activations
            const int count = units.count * (kind == 2 ? 2 : kind == 3 ? (n.F + n.D - 1) / n.D : 1), p = pieces + lane;
            if (lane < count) await(control.arrived + p % kTokenBarriers, p / kTokenBarriers);
            __syncwarp();
            pieces += count;
            const unsigned char* matrix = weights + (kind < 4 ? n.matrix_at[kind] : tile % n.slots * tile_bytes);
            Tiles a = {};  // or it would count as needed from matrix to matrix
            load_weights(a, matrix, rows, K, 0);
            if (kind == 3) token_barrier();  // the sums before have been read: h lies in their place
            const float square = tile <= 0 ? gather(K, weight, n.from_at[kind], kind == 0 ? tag - 1 : tag) : 0.0f;
            token_barrier();  // the activations are there
            const float squares = warp_sum(square);
            Sums sum = {};
            multiply_weights(sum, a, rows, K, 0);
            if (weight && tile <= 0 && lane == 0) control.squares[read_b][reader] = squares;
            const int step_k = 16 * kTokenSteps * (flat(rows) ? kTokenTiles : 1);
#pragma unroll 1
            for (int k0 = step_k; k0 < columns(rows, K); k0 += step_k) {  // what did not fit into registers
                load_weights(a, matrix, rows, K, k0);
                multiply_weights(sum, a, rows, K, k0);
            }
            leave_sums(sums, sum, rows);
            token_barrier();  // all parts of the sums are there, and the weights have been read
            if (thread == 0) *used = *used + 1;

            // ---- in: rstd W (x * norm);  out, down: res * x + W y;  gate_up: silu(gate) * up;  head: logits
            if ((kTokenWarps - 1 - warp) * 5 >= stride * B) continue;
            float v = sum_of(parts);
            if (weight) v *= rstd(it.b);
            if (kind == 4) {
                const int token = 6 * units.first + row;
                if (it.on && token < n.V) {
                    if (left == 1) g.logits[int64(it.b) * ((n.V + 7) / 8 * 8) + token] = v;
                    if (token < g.vocab) best = max(best, ranked(v, token));
                }
                continue;
            }
            if (kind == 2) v = swiglu<bf16>(v, rstd(it.b) * sum_of(parts + 6 * kSumRow));
            if (kind % 2 == 1) v = x_own = to_float(from_float<bf16>(res * x_own + v));
            send_six(to, it, v, tag);
        }

        // The best of all blocks. The fences order what was written to K and V before what the next step reads of them.
        best = warp_max(best);
        if (kTokenWarps - 1 - warp < B && lane == 0) control.best[kTokenWarps - 1 - warp] = best;
        token_barrier();  // the best of each sequence is there
        const uint32_t tag = tag0 + uint32_t(n.L);
        Word* all = g.words + n.best_at + warp * n.blocks;
        if (warp < B && lane == 0) {
            const Ranked top = control.best[warp];
            __threadfence();
            send(all + block, uint32_t(top), uint32_t(top >> 32), uint32_t(top), tag);
        }
        if (left == 1 && block > 0) return;
        if (warp < B) {
            Ranked top = 0;
#pragma unroll 1
            for (int k = lane; k < n.blocks; k += 32) {
                const Word w = receive(all + k, tag);
                top = max(top, Ranked(w.b) << 32 | (w.a & w.c));  // both are the same
            }
            top = warp_max(top);
            __threadfence();
            if (lane == 0) {
                control.tokens[warp] = token_of(top);
                if (block == 0) g.chosen[(g.cursor->made + g.steps - left) * B + warp] = reported(top);
                if (block == 0 && left == 1) g.tokens[warp] = token_of(top);
            }
        }
        token_barrier();  // the tokens are there
    }
    if (thread == 0) *g.cursor = {past, g.cursor->made + g.steps};
#endif
}

// ---------------------------------------------------------------------------------------------------------------------
// 12  The model
// ---------------------------------------------------------------------------------------------------------------------

struct MemoryInfo {
    size_t free = 0, total = 0;
    MemoryInfo() { CHECK_CUDA(cudaMemGetInfo(&free, &total)); }
};

// Device memory that frees itself.
class Memory {
  public:
    Memory() = default;
    Memory(const Memory&) = delete;
    Memory& operator=(const Memory&) = delete;
    ~Memory() { reset(); }
    void reset() {
        if (base) cudaFree(base);  // not for nothing: it may not be called while launches are recorded
        base = nullptr;
        bytes = 0;
    }
    void resize(size_t n, const char* what) {
        reset();
        if (n == 0) return;
        if (cudaMalloc(&base, n) != cudaSuccess) {
            cudaGetLastError();
            base = nullptr;
            fail("GPU: %s needs %s, %s are free; a smaller --batch, --seq-len or model needs less", what,
                 byte_text(double(n)).c_str(), byte_text(double(MemoryInfo().free)).c_str());
        }
        bytes = n;
    }
    template <class T>
    T* make(int64 n, const char* what) {  // room for n numbers of type T
        resize(size_t(n) * sizeof(T), what);
        return at<T>();
    }
    size_t size() const { return bytes; }
    template <class T = char>
    T* at() const {
        return static_cast<T*>(base);
    }

  private:
    void* base = nullptr;
    size_t bytes = 0;
};

// n numbers from the host, rounded to T; and back.
template <class T>
static void to_device(T* to, const float* host, int64 n, cudaStream_t stream) {
    if (n == 0) return;
    Memory staging;
    float* wide = staging.make<float>(n, "a copy");
    CHECK_CUDA(cudaMemcpyAsync(wide, host, staging.size(), cudaMemcpyHostToDevice, stream));
    launch("convert", convert_kernel<T, float>, ceil_div(n, 256), 256, 0, stream, to, wide, n);
    CHECK_CUDA(cudaStreamSynchronize(stream));
}
template <class T>
static void to_host(float* host, const T* from, int64 n, cudaStream_t stream) {
    if (n == 0) return;
    Memory staging;
    float* wide = staging.make<float>(n, "a copy");
    launch("convert", convert_kernel<float, T>, ceil_div(n, 256), 256, 0, stream, wide, from, n);
    CHECK_CUDA(cudaMemcpyAsync(host, wide, staging.size(), cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
}

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
    A* x;             // (rows,D) input
    float* rstd1;     // (rows)
    A* u1;            // (rows,D) first norm
    A* proj;          // (rows, ssd_width or attn_width, padded32): C|B|X|dt_raw, or q|k|v with q and k rotated
    float *dt, *dA;   // SSD: (rows,H)
    A* chunk_states;  // SSD: (B,chunks,H,P,N)
    float* lse;       // attention: (rows,H)
    A* y;             // (rows,D) heads' outputs
    A* x_mid;         // (rows,D) after the first residual
    float* rstd2;     // (rows)
    A* u2;            // (rows,D) second norm
    A* gate_up;       // (rows,2F)
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
    Ranked* best = nullptr;              // (B), zeros between steps
    int32_t* chosen = nullptr;           // (kDecodeRun,B)
    float* attention_partial = nullptr;  // (B,H,splits,P+2)
    unsigned* tickets = nullptr;         // (B,H), or fewer; zeros between steps
    int64 splits = 1;
    int64 steps = 0, graph_layout = -1, graph_vocab = 0;
    cudaGraphExec_t graph = nullptr;
    // of the kernel that makes whole tokens, where it can
    bool whole = false;
    TokenPlan token_plan{};
    TokenLayer* token_layers = nullptr;
    Word* words = nullptr;
    uint32_t tag = 0;

    ~CudaState() override { drop_graph(); }
    void drop_graph() {
        if (graph) cudaGraphExecDestroy(graph);
        graph = nullptr;
    }
    const void* const model;  // whose it is: it holds addresses of that one's memory
    CudaState(const Config& c, int64 sequences, int64 tokens, const void* of) : layers(size_t(c.L)), model(of) {
        B = sequences;
        capacity = tokens;
        if (!std::is_same<A, float>::value && CUDART_VERSION >= 12030 && has_wgmma())
            whole = plan_token(&token_plan, c, B, capacity, multiprocessors(), shared_memory_per_block());
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
        splits = attention_splits(B, c.H, c.P(), capacity);
        if (whole) {
            arena->take(&token_layers, c.L);
            arena->take(&words, token_plan.words);
        }
        if (c.attn_period > 0) {
            arena->take(&attention_partial, B * c.H * splits * (c.P() + 2));
            arena->take(&tickets, B * c.H);
        }
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
    int64 folded;  // offset in decoding's copy, of those behind a norm (section 11b)
    int64 in, out, ld;
};

// What memory is laid out for; the last are decode steps with decoding's copy of the matrices.
enum class Purpose { none, training, inference, folded_steps };

template <class A>
class Model {
  public:
    static constexpr bool kCopy = !std::is_same<A, float>::value;  // whether A needs a rounded copy of the weights
    const Config config;
    const ParamTable table;
    const SsdTiles tiles;
    const bool recompute;                // keep only each layer's input, make the rest again in the backward pass
    ref::Probe<float>* probe = nullptr;  // sees each tensor as soon as it is there (section 16)
    cudaStream_t stream = nullptr;

    Model(const Config& c, bool recompute_layers);
    ~Model() {
        if (stream) cudaStreamDestroy(stream);
    }

    float* buffer(Buffer which) {
        const char* const names[] = {"the weights", "the gradients", "the first moments", "the second moments"};
        Memory& b = buffers[int(which)];
        if (b.size() == 0) {
            // and room for the padding of the last matrix's gradient (linear_backward_weight)
            b.make<float>(table.count + 32 * config.D, names[int(which)]);
            CHECK_CUDA(cudaMemsetAsync(b.at(), 0, b.size(), stream));
        }
        return b.at<float>();
    }
    std::vector<std::string> gemm_choices() const { return blas.choices(); }
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
        carve(&plan, batch, length, Purpose::training);
        const size_t n = plan.used;
        carved = Purpose::none;
        return n;
    }

  private:
    Blas blas;
    Memory buffers[4], copy, adamw_tiles, activations, rope_memory, scratch;
    int64 adamw_tile_count = 0, copy_count = 0, folded_count = 0;
    int64 weights_version = 1, folded_version = 0;  // how often the weights have changed; that of `folded`, 0: none
    std::map<std::pair<int64, Param>, Matrix> matrices;  // (layer, first parameter)
    // of the last forward
    std::vector<LayerActivations<A>> layers;
    A *x_final, *u_final;
    float *rstd_final, *losses;
    A* logits;  // (head_rows, padded8(V)): of one part of the rows, or of all if they fit
    int64 head_rows = 0;
    int32_t *tokens, *targets, *order, *start;  // (rows), start (rows + 1)
    int64 B = 0, T = 0, distinct = 0;
    Purpose carved = Purpose::none;
    int64 carved_B = 0, carved_T = 0;
    bool has_targets = false, dropout_on = false;
    DropoutKey dropout_key{};
    float *cos_qk = nullptr, *sin_qk = nullptr, *cos_cb = nullptr, *sin_cb = nullptr;
    int64 rope_positions = 0, layout_count = 0;  // how often memory was laid out anew
    // not needed after the op that reads it
    A *m, *h, *dx, *dm, *du, *dy, *dproj, *dgate_up, *last, *folded;
    float *ddt, *ddA, *partial, *logits32, *segment_scratch;
    float* attention_stats;  // (B,H,T padded) pairs: log-sum-exp, dy . y

    const float* w(Param p, int64 layer = -1) const { return buffers[0].at<float>() + table.offset(p, layer); }
    float* g(Param p, int64 layer = -1) const { return buffers[1].at<float>() + table.offset(p, layer); }
    Dropout dropout(int64 layer, int half) const {
        return {dropout_on ? config.dropout : 0.0, dropout_key, uint32_t(2 * layer + half)};
    }
    const Matrix& matrix(Param p, int64 layer) const { return matrices.at({layer, p}); }
    // Of a layer's mixer: [q|k|v] or [C|B|X|dt], and that of its outputs. Of the model: the head.
    const Matrix& mixer_in(int64 i) const { return matrix(config.is_attention(i) ? Param::q_proj : Param::c_proj, i); }
    const Matrix& mixer_out(int64 i) const {
        return matrix(config.is_attention(i) ? Param::o_proj : Param::out_proj, i);
    }
    const Matrix& head() const { return matrix(config.tie ? Param::word_embed : Param::lm_head, -1); }
    const A* data(const Matrix& x) const {
        return kCopy ? copy.at<A>() + x.copy : reinterpret_cast<const A*>(buffers[0].at<float>() + x.master);
    }
    // y = x W^T; and dx = scale dy W, dW += scale dy^T x
    template <class Y>
    void linear(Y* y, const A* x, const Matrix& a, int64 rows, bool accumulate = false) {
        linear_forward(blas, y, a.ld, x, data(a), rows, a.in, kCopy ? a.ld : a.out, stream, accumulate);
    }
    void linear_backward_input(A* d_x, const A* d_y, const Matrix& a, int64 rows, float scale = 1) {
        cuda::linear_backward_input(blas, d_x, d_y, a.ld, data(a), rows, a.in, kCopy ? a.ld : a.out, scale, stream);
    }
    // With the padding of dy, whose rows of dW lie where the next parameters' gradients are (or, for the last matrix,
    // behind the buffer's end, where there is room): dy is zero there, so that the product adds zeros to them. It is
    // faster than without the padding, and by a factor of two where `out` is no multiple of 8.
    void linear_backward_weight(const A* d_y, const A* x, const Matrix& a, int64 rows, float scale = 1) {
        cuda::linear_backward_weight(blas, buffers[1].at<float>() + a.master, d_y, a.ld, x, rows, a.in,
                                     kCopy ? a.ld : a.out, scale, stream);
    }
    void linear_backward(A* d_x, const A* d_y, const A* x, const Matrix& a, int64 rows, float scale = 1) {
        linear_backward_input(d_x, d_y, a, rows, scale);
        linear_backward_weight(d_y, x, a, rows, scale);
    }
    void carve(Arena*, int64 batch, int64 length, Purpose);
    void prepare(int64 batch, int64 length, Purpose);
    void extend_rope(int64 positions);
    void layers_forward(CudaState<A>* state, int64 before);
    void layer_forward(int64 layer, CudaState<A>* state, int64 before, A* hidden);
    void remake(int64 layer);
    void decode_step(CudaState<A>* state, int64 vocab);
    void decode_layers(CudaState<A>* state);
    void decode_whole(CudaState<A>* state, int64 vocab, int64 steps);
    void fold_norms();
    void check_tokens(const int32_t* ids, int64 n) const {
        for (int64 r = 0; r < n; ++r)
            if (ids[r] < 0 || ids[r] >= config.V)
                fail("token %d is outside the vocabulary of %lld", int(ids[r]), (long long)config.V);
    }
    void check_room(const CudaState<A>& state, int64 batch, int64 count) const {
        if (state.model != this) fail("the state is another engine's: save_state() and load_state() move it");
        if (state.B != batch || state.position + count > state.capacity)
            fail("state has %lld sequences and room for %lld tokens; asked for %lld sequences and %lld tokens",
                 (long long)state.B, (long long)state.capacity, (long long)batch, (long long)(state.position + count));
    }
    void mixer_forward(int64 layer, CudaState<A>* state, int64 before);
    void mixer_backward(int64 layer);

    // As the reference's: shows a tensor of the layer called `name`, B*T rows `ld` apart (0: without gaps), to the probe.
    template <class X>
    void see(int64 layer, const char* name, const X* tensor, std::initializer_list<int64> shape, int64 ld = 0) {
        if (probe) show("", layer, name, tensor, shape, ld, 1);
    }
    template <class X>
    void see_gradient(int64 layer, const char* name, const X* tensor, std::initializer_list<int64> shape, int64 ld = 0,
                      float scale = 1) {
        if (probe) show("grad.", layer, name, tensor, shape, ld, scale);
    }
    template <class X>
    void show(const char* kind, int64 layer, const char* name, const X* tensor, const Shape& shape, int64 ld,
              float scale);
    void see_rotated(const char* kind, int64 layer, const A* proj, int64 ld);
    void see_dt_gradient(int64 layer);
    template <class X>
    std::vector<X> on_host(const X* from, int64 n) const {
        std::vector<X> v(static_cast<size_t>(n));
        CHECK_CUDA(cudaMemcpyAsync(v.data(), from, v.size() * sizeof(X), cudaMemcpyDeviceToHost, stream));
        CHECK_CUDA(cudaStreamSynchronize(stream));
        return v;
    }
};

template <class A>
Model<A>::Model(const Config& c, bool recompute_layers)
    : config(c),
      table(c),
      tiles(c.attn_period == 1 && c.attn_offset == 0 ? SsdTiles{64, 32, 32} : ssd_tiles<A>(c.N, c.P())),
      recompute(recompute_layers),
      layers(size_t(c.L)) {
    for (int64 i = 0; i < c.L; ++i)
        if (c.is_attention(i) && c.P() > kAttentionMaxP)
            fail("attention on the GPU: the head dimension is %lld; at most %lld is supported", (long long)c.P(),
                 (long long)kAttentionMaxP);
    if (c.D > kNormMaxD)
        fail("norms on the GPU: the model's width is %lld; at most %lld is supported", (long long)c.D,
             (long long)kNormMaxD);
    // An ordinary stream, which waits for the default one: that is where cudaMemset and cudaMemcpy work, and they may return
    // before they are done.
    CHECK_CUDA(cudaStreamCreate(&stream));

    // The matrices, and where their rounded copies lie: 256 bytes apart, so that each begins aligned.
    const auto add = [&](Param p, int64 layer, int64 out, int64 in, int64 ld, bool normed = false) {
        matrices[{layer, p}] = {table.offset(p, layer), copy_count, folded_count, in, out, ld};
        copy_count += round_up(ld * in, 128);
        if (normed) folded_count += round_up(ld * in, 128);
    };
    for (int64 i = 0; i < c.L; ++i) {
        const bool attention = c.is_attention(i);
        if (attention) add(Param::q_proj, i, c.attn_width(), c.D, padded32(c.attn_width()), true);
        else add(Param::c_proj, i, c.ssd_width(), c.D, padded32(c.ssd_width()), true);
        add(attention ? Param::o_proj : Param::out_proj, i, c.D, c.D, c.D);
        add(Param::gate_proj, i, 2 * c.F, c.D, 2 * c.F, true);
        add(Param::down_proj, i, c.D, c.F, c.D);
    }
    add(c.tie ? Param::word_embed : Param::lm_head, -1, c.V, c.D, padded8(c.V));
    if (kCopy) {
        copy.make<A>(copy_count, "the rounded weights");
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
    adamw_tiles.make<AdamWTile>(adamw_tile_count, "a list of parameters");
    CHECK_CUDA(cudaMemcpy(adamw_tiles.at(), list.data(), adamw_tiles.size(), cudaMemcpyHostToDevice));
    buffer(Buffer::weights);
}

template <class A>
void Model<A>::weights_written() {
    ++weights_version;
    if (kCopy)
        launch("copy_weights", copy_weights_kernel<A>, adamw_tile_count, 256, 0, stream, copy.at<A>(),
               buffers[0].at<float>(), adamw_tiles.at<AdamWTile>());
}

// Logits of all rows are kept between forward and backward if they are this small; else they are made a part at a time,
// and again in the backward pass.
static constexpr int64 kLogitsKept = int64(8) << 30, kLogitsPart = int64(1) << 30;

// Lays out what a forward pass (and, when training, a backward pass) needs. In inference all layers use the same
// memory; with `recompute` they do so too, but for each layer's input.
template <class A>
void Model<A>::carve(Arena* a, int64 batch, int64 length, Purpose purpose) {
    const bool training = purpose == Purpose::training;
    const Config& c = config;
    const int64 rows = batch * length, D = c.D, H = c.H, logit_row = padded8(c.V);
    const bool shared = !training || recompute;
    int64 width = 0;  // the wider of the two projections
    bool any_attention = false, any_ssd = false;
    for (int64 i = 0; i < c.L; ++i) {
        width = std::max(width, padded32(c.is_attention(i) ? c.attn_width() : c.ssd_width()));
        (c.is_attention(i) ? any_attention : any_ssd) = true;
    }
    a->take(&tokens, rows);
    a->take(&targets, rows);
    a->take(&order, rows);
    a->take(&start, rows + 1);
    for (int64 i = 0; i < c.L; ++i) {
        LayerActivations<A>& l = layers[size_t(i)];
        if (shared && i > 0) {
            l = layers[0];
            if (training) a->take(&l.x, rows * D);
            continue;
        }
        const bool attention = shared ? any_attention : c.is_attention(i), ssd = shared ? any_ssd : !attention;
        l = {};
        a->take(&l.x, rows * D);
        a->take(&l.rstd1, rows);
        a->take(&l.u1, rows * D);
        a->take(&l.proj, rows * (shared ? width : padded32(attention ? c.attn_width() : c.ssd_width())));
        if (ssd) {
            a->take(&l.dt, rows * H);
            a->take(&l.dA, rows * H);
        }
        if (training && ssd) a->take(&l.chunk_states, batch * H * ssd_chunks(tiles, length) * c.P() * c.N);
        if (attention) a->take(&l.lse, rows * H);
        a->take(&l.y, rows * D);
        a->take(&l.x_mid, rows * D);
        a->take(&l.rstd2, rows);
        a->take(&l.u2, rows * D);
        a->take(&l.gate_up, rows * 2 * c.F);
    }
    a->take(&m, rows * D);
    a->take(&segment_scratch, ssd_scratch({batch, length, H, c.P(), c.N, c.Q, 0}, tiles));
    if (training) a->take(&x_final, rows * D);
    else x_final = layers[0].x;
    a->take(&u_final, rows * D);
    a->take(&rstd_final, rows);
    if (!training) {
        head_rows = length == 1 ? rows : std::min(rows, std::max<int64>(1, kLogitsPart / 4 / logit_row));
        a->take(&h, rows * c.F);
        a->take(&last, batch * D);
        a->take(&logits32, head_rows * logit_row);
        if (purpose == Purpose::folded_steps) a->take(&folded, folded_count);
        return;
    }
    const int64 row_bytes = logit_row * int64(sizeof(A));
    head_rows = rows <= kLogitsKept / row_bytes ? rows : std::max<int64>(1, kLogitsPart / row_bytes);
    // The layers' scratch shares its memory with the logits, which live from the head's forward to its backward: when
    // no layer is at work.
    Arena scratch_of_layers = *a;
    a->take(&logits, head_rows * logit_row);
    scratch_of_layers.take(&h, rows * c.F);  // and its gradient
    scratch_of_layers.take(&dy, rows * D);
    scratch_of_layers.take(&dproj, rows * width);
    scratch_of_layers.take(&dgate_up, rows * 2 * c.F);
    a->used = std::max(a->used, scratch_of_layers.used);
    a->take(&losses, rows);
    a->take(&dx, rows * D);
    if (c.dropout > 0) a->take(&dm, rows * D);
    else dm = dx;
    a->take(&du, rows * D);
    a->take(&ddt, rows * H);
    a->take(&ddA, rows * H);
    a->take(&attention_stats, 2 * batch * H * padded_stats(length));
    a->take(&partial, kPartialBlocks * 2 * std::max(D, H));
}

template <class A>
void Model<A>::prepare(int64 batch, int64 length, Purpose purpose) {
    if (carved == purpose && carved_B == batch && carved_T == length) return;
    carved = Purpose::none;
    folded_version = 0;
    Arena plan;
    carve(&plan, batch, length, purpose);
    if (plan.used > activations.size()) {
        CHECK_CUDA(cudaStreamSynchronize(stream));
        activations.reset();
        const size_t free = MemoryInfo().free;
        if (plan.used > free) {
            int64 fits = 0, too_many = batch;  // bisect for the largest batch that fits
            while (too_many - fits > 1) {
                const int64 middle = (fits + too_many) / 2;
                Arena smaller;
                carve(&smaller, middle, length, purpose);
                (smaller.used <= free ? fits : too_many) = middle;
            }
            std::string advice = fits > 0 ? format("a batch of %lld fits", (long long)fits)
                                          : std::string("not even a batch of 1 fits: shorten --seq-len");
            if (purpose == Purpose::training && !recompute) advice += "; train --recompute needs less";
            fail("GPU: %lld x %lld tokens need %s of memory, %s are free; %s", (long long)batch, (long long)length,
                 byte_text(double(plan.used)).c_str(), byte_text(double(free)).c_str(), advice.c_str());
        }
        activations.resize(plan.used, "a forward pass");
    }
    Arena real{activations.at(), 0};
    carve(&real, batch, length, purpose);
    ++layout_count;
    carved = purpose;
    carved_B = batch;
    carved_T = length;
}

template <class A>
void Model<A>::extend_rope(int64 positions) {
    if (positions <= rope_positions) return;
    ref::RopeTable<float> qk, cb;
    qk.extend(config.P(), config.rope_theta, std::max({positions, 2 * rope_positions, kSsdRopeRows}));
    cb.extend(config.N, config.rope_theta, qk.positions);
    CHECK_CUDA(cudaStreamSynchronize(stream));
    ++layout_count;
    rope_positions = 0;  // should there be no memory
    const std::pair<float**, const std::vector<float>&> parts[] = {
        {&cos_qk, qk.cos}, {&sin_qk, qk.sin}, {&cos_cb, cb.cos}, {&sin_cb, cb.sin}};
    Arena plan;
    for (const auto& part : parts) plan.take(part.first, int64(part.second.size()));
    rope_memory.resize(plan.used, "the table of positions");
    plan = {rope_memory.at(), 0};
    for (const auto& part : parts) {
        const size_t n = part.second.size();
        plan.take(part.first, int64(n));
        CHECK_CUDA(cudaMemcpy(*part.first, part.second.data(), n * sizeof(float), cudaMemcpyHostToDevice));
    }
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
    has_targets = false;  // backward() needs a forward that had some
    prepare(batch, length, state ? Purpose::inference : Purpose::training);
    extend_rope(pos0 + length);
    B = batch;
    T = length;
    dropout_on = key && c.dropout > 0;
    if (key) dropout_key = *key;
    const auto upload = [&](int32_t* to, const int32_t* from, int64 n) {
        CHECK_CUDA(cudaMemcpyAsync(to, from, size_t(n) * sizeof(int32_t), cudaMemcpyHostToDevice, stream));
    };
    upload(tokens, tokens_in, rows);
    if (targets_in) upload(targets, targets_in, rows);
    if (profile) profile->mark("upload", stream);

    layers_forward(state, pos0);
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
            linear(logits32, u + r0 * D, head(), part);
            CHECK_CUDA(cudaMemcpy2DAsync(host_logits + r0 * c.V, size_t(c.V) * 4, logits32, size_t(head().ld) * 4,
                                         size_t(c.V) * 4, size_t(part), cudaMemcpyDeviceToHost, stream));
        }
        CHECK_CUDA(cudaStreamSynchronize(stream));
        return 0;
    }
    if (!targets_in) return 0;
    for (int64 r0 = 0; r0 < rows; r0 += head_rows) {
        const int64 part = std::min(head_rows, rows - r0);
        linear(logits, u_final + r0 * D, head(), part);
        if (head_rows == rows) see(-1, "logits", logits, {B, T, c.V}, head().ld);
        cross_entropy(losses + r0, logits, targets + r0, part, c.V, head_rows == rows, stream);
    }
    see(-1, "losses", losses, {B, T});
    // While the GPU works: for the embedding's gradient.
    std::vector<int32_t> host_order, host_start;
    distinct = sort_by_token(&host_order, &host_start, tokens_in, rows, c.V);
    upload(order, host_order.data(), rows);
    upload(start, host_start.data(), distinct + 1);
    double total = 0;
    for (const float l : on_host(losses, rows)) total += double(l);
    has_targets = true;
    return total / double(rows);
}

// tokens -> u_final
template <class A>
void Model<A>::layers_forward(CudaState<A>* state, int64 before) {
    const Config& c = config;
    const int64 rows = B * T, D = c.D;
    embedding_forward(layers[0].x, tokens, w(Param::word_embed), rows, D, stream);
    see(-1, "embedding", layers[0].x, {B, T, D});
    residual_norm_forward<A>(nullptr, layers[0].u1, layers[0].rstd1, layers[0].x, nullptr, nullptr, w(Param::norm1, 0),
                             c.norm_eps, {}, rows, D, stream);
    for (int64 i = 0; i < c.L; ++i) {
        LayerActivations<A>& a = layers[size_t(i)];
        see(i, "norm1", a.u1, {B, T, D});
        layer_forward(i, state, before, h);
        see(i, "ffn.hidden", h, {B, T, c.F});
        linear(m, h, matrix(Param::down_proj, i), rows);
        see(i, "ffn.out", m, {B, T, D});
        // and the first norm of the next layer, or the final one
        const bool end = i + 1 == c.L;
        LayerActivations<A>* next = end ? nullptr : &layers[size_t(i + 1)];
        A* x_out = end ? x_final : next->x;
        residual_norm_forward(x_out, end ? u_final : next->u1, end ? rstd_final : next->rstd1, a.x_mid, m,
                              w(Param::res2, i), end ? w(Param::final_norm) : w(Param::norm1, i + 1), c.norm_eps,
                              dropout(i, 1), rows, D, stream);
        see(i, "residual2", x_out, {B, T, D});
    }
    see(-1, "final_norm", u_final, {B, T, D});
}

// x, u1 -> y, x_mid, u2, gate_up: with x and u1 all that the layer's backward pass reads; and the feed-forward's hidden
// (null: not wanted), which that one makes again
template <class A>
void Model<A>::layer_forward(int64 i, CudaState<A>* state, int64 before, A* hidden) {
    const Config& c = config;
    LayerActivations<A>& a = layers[size_t(i)];
    const int64 rows = B * T, D = c.D, F = c.F;
    mixer_forward(i, state, before);
    linear(m, a.y, mixer_out(i), rows);
    see(i, c.is_attention(i) ? "attn.out" : "ssd.out", m, {B, T, D});
    residual_norm_forward(a.x_mid, a.u2, a.rstd2, a.x, m, w(Param::res1, i), w(Param::norm2, i), c.norm_eps,
                          dropout(i, 0), rows, D, stream);
    see(i, "residual1", a.x_mid, {B, T, D});
    see(i, "norm2", a.u2, {B, T, D});
    gate_up_forward(blas, hidden, a.gate_up, a.u2, data(matrix(Param::gate_proj, i)), rows, D, F, stream);
    see(i, "ffn.gate", a.gate_up, {B, T, F}, 2 * F);
    see(i, "ffn.up", a.gate_up + F, {B, T, F}, 2 * F);
}

// With `recompute`: the layer's activations once more, from its input, by the same launches and so with the same bits.
// They replace those of another layer. The forward pass leaves the last layer's.
template <class A>
void Model<A>::remake(int64 i) {
    LayerActivations<A>& a = layers[size_t(i)];
    residual_norm_forward<A>(nullptr, a.u1, a.rstd1, a.x, nullptr, nullptr, w(Param::norm1, i), config.norm_eps, {},
                             B * T, config.D, stream);
    layer_forward(i, nullptr, 0, nullptr);
}

template <class A>
void Model<A>::decode(CudaState<A>* state, const int32_t* last_tokens, int64 count, int64 vocab, float* host_logits,
                      int32_t* chosen) {
    const Config& c = config;
    if (vocab < 1 || vocab > c.V) fail("cannot choose among %lld of %lld tokens", (long long)vocab, (long long)c.V);
    check_tokens(last_tokens, state->B);
    check_room(*state, state->B, count);
    has_targets = dropout_on = false;
    B = state->B;
    T = 1;
    prepare(B, 1, state->whole ? Purpose::inference : Purpose::folded_steps);
    extend_rope(state->position + count);
    if (!state->whole) fold_norms();
    CHECK_CUDA(cudaMemcpyAsync(tokens, last_tokens, size_t(B) * sizeof(int32_t), cudaMemcpyHostToDevice, stream));
    std::vector<int32_t> run(size_t(kDecodeRun * B));
    for (int64 made = 0; made < count; made += kDecodeRun) {
        const int64 steps = std::min(kDecodeRun, count - made);
        const DecodeCursor cursor{state->position, 0};
        CHECK_CUDA(cudaMemcpyAsync(state->cursor, &cursor, sizeof cursor, cudaMemcpyHostToDevice, stream));
        if (state->whole) decode_whole(state, vocab, steps);
        else
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
    const auto work = [&] {
        decode_layers(state);
        linear(logits32, u_final, head(), B);
        best_logit(state->best, logits32, B, vocab, head().ld, stream);
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

// Decoding's copy of the matrices behind a norm, unless it is there and the weights are those of the last time.
template <class A>
void Model<A>::fold_norms() {
    if (folded_version == weights_version) return;
    const auto fold = [&](const Matrix& a, const float* w_norm) {
        launch("fold_norm", fold_norm_kernel<A>, ceil_div(a.ld * a.in, 256), 256, 0, stream, folded + a.folded,
               buffers[0].at<float>() + a.master, w_norm, a.out, a.ld, a.in);
    };
    for (int64 i = 0; i < config.L; ++i) {
        fold(mixer_in(i), w(Param::norm1, i));
        fold(matrix(Param::gate_proj, i), w(Param::norm2, i));
    }
    folded_version = weights_version;
}

// tokens -> u_final, of one token of each sequence: layers_forward with norms and residuals inside other kernels (section
// 11b). x and x_mid turn into each other, each product with a folded matrix reads one of them, the next adds to the other.
template <class A>
void Model<A>::decode_layers(CudaState<A>* state) {
    const Config& c = config;
    const int64 row = c.Hkv * c.P();
    const AttentionShape attention{B, 1, 0, c.H, c.Hkv, c.P(), padded32(c.attn_width()), row, state->capacity * row};
    const SsdShape ssd{B, 1, c.H, c.P(), c.N, c.Q, padded32(c.ssd_width())};
    LayerActivations<A>& a = layers[0];  // every layer's
    const auto linear_folded = [&](A* y, const A* x, const Matrix& of) {
        linear_forward(blas, y, of.ld, x, folded + of.folded, B, of.in, of.ld, stream);
    };
    embedding_forward(a.x, tokens, w(Param::word_embed), B, c.D, stream);
    for (int64 i = 0; i < c.L; ++i) {
        auto& past = state->layers[size_t(i)];
        const ResidualStream<A> residual1{a.x_mid, a.x, w(Param::res1, i), int(c.D), float(c.norm_eps)},
            residual2{a.x, a.x_mid, w(Param::res2, i), int(c.D), float(c.norm_eps)};
        linear_folded(a.proj, a.x, mixer_in(i));
        if (c.is_attention(i))
            attention_step(a.y, state->attention_partial, state->tickets, past.k, past.v, a.proj, residual1, cos_qk,
                           sin_qk, attention, state->cursor, state->splits, stream);
        else
            ssd_step(a.y, past.S, a.proj, residual1, w(Param::dt_bias, i), w(Param::A_log, i), cos_cb, sin_cb,
                     c.ssd_decay, ssd, state->cursor, stream);
        linear(a.x_mid, a.y, mixer_out(i), B, true);
        linear_folded(a.gate_up, a.x_mid, matrix(Param::gate_proj, i));
        swiglu_step(h, a.gate_up, residual2, B, c.F, stream);
        linear(a.x, h, matrix(Param::down_proj, i), B, true);
    }
    residual_norm_forward<A>(nullptr, u_final, rstd_final, a.x, nullptr, nullptr, w(Param::final_norm), c.norm_eps, {},
                             B, c.D, stream);
}

// Several, in one kernel.
template <class A>
void Model<A>::decode_whole(CudaState<A>* state, int64 vocab, int64 steps) {
    if constexpr (kCopy) {
        const Config& c = config;
        const TokenPlan& plan = state->token_plan;
        if (state->steps++ == 0) {
            std::vector<TokenLayer> list;
            for (int64 i = 0; i < c.L; ++i) {
                const bool attention = c.is_attention(i);
                const auto& past = state->layers[size_t(i)];
                list.push_back({data(mixer_in(i)), data(mixer_out(i)), data(matrix(Param::gate_proj, i)),
                                data(matrix(Param::down_proj, i)), w(Param::norm1, i), w(Param::norm2, i),
                                w(Param::res1, i), w(Param::res2, i), attention ? nullptr : w(Param::dt_bias, i),
                                attention ? nullptr : w(Param::A_log, i), past.S, past.k, past.v});
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
                       data(head()),
                       tokens,
                       state->chosen,
                       state->cursor,
                       logits32,
                       state->words,
                       int(vocab),
                       int(steps),
                       state->tag + 1};
        state->tag += uint32_t((c.L + 1) * steps);
        void* pointers[] = {const_cast<TokenPlan*>(&plan), &args};
        const void* const kernels[2][3] = {
            {(const void*)token_kernel<8, 2>, (const void*)token_kernel<8, 4>, (const void*)token_kernel<8, 8>},
            {(const void*)token_kernel<16, 2>, (const void*)token_kernel<16, 4>, (const void*)token_kernel<16, 8>}};
        const void* kernel = kernels[plan.P > 64][plan.most / 4];
        CHECK_CUDA(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared));
        CHECK_CUDA(cudaLaunchCooperativeKernel(kernel, dim3(unsigned(plan.blocks)), dim3(kTokenLaunch), pointers,
                                               size_t(plan.shared), stream));
        if (profile) profile->mark("token", stream);
    }
}

// u1 -> y: one product makes C|B|X|dt_raw or q|k|v side by side. RoPE turns q and k in place; C and B stay as they are,
// the SSD kernels turn them on chip.
template <class A>
void Model<A>::mixer_forward(int64 i, CudaState<A>* state, int64 before) {
    const Config& c = config;
    LayerActivations<A>& a = layers[size_t(i)];
    typename CudaState<A>::Layer* past = state ? &state->layers[size_t(i)] : nullptr;
    const int64 rows = B * T, H = c.H, N = c.N, P = c.P();
    const Matrix& projection = mixer_in(i);
    const int64 ld = projection.ld;
    linear(a.proj, a.u1, projection, rows);
    if (probe) see_rotated("", i, a.proj, ld);
    if (c.is_attention(i)) {
        A *q = a.proj, *k = q + H * P, *v = k + c.Hkv * P;
        rope(q, cos_qk, sin_qk, P, B, T, H + c.Hkv, ld, before, false, stream);  // q and k are neighbours
        AttentionShape n{B, T, before + T, H, c.Hkv, P, ld, ld, T * ld};
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
        see(i, "attn.lse", a.lse, {B, T, H});
        see(i, "attn.y", a.y, {B, T, H, P});
        return;
    }
    A *sc = a.proj, *sb = sc + H * N, *sx = sb + H * N, *dt_raw = sx + H * P;
    ssd_dt_forward(a.dt, a.dA, dt_raw, w(Param::dt_bias, i), w(Param::A_log, i), c.ssd_decay, rows, H, ld, stream);
    const SsdShape n{B, T, H, P, N, c.Q, ld};
    see(i, "ssd.dt", a.dt, {B, T, H});
    see(i, "ssd.dA", a.dA, {B, T, H});
    float* S = past ? past->S : nullptr;
    Memory final_state;  // training does not need it
    if (probe && !past) final_state.make<float>(B * H * P * N, "the final state");
    ssd_forward<A>(a.y, past ? S : final_state.at<float>(), past ? nullptr : a.chunk_states, segment_scratch, sc, sb,
                   sx, a.dt, a.dA, S, {cos_cb, sin_cb, before}, n, tiles, stream);
    see(i, "ssd.y", a.y, {B, T, H, P});
    if (!past) see(i, "ssd.final_state", final_state.at<float>(), {B, H, P, N});
}

// Adds scale * d(mean loss) to the gradients: the forward's lines from the last to the first.
template <class A>
void Model<A>::backward(double scale) {
    const Config& c = config;
    const int64 rows = B * T, D = c.D, F = c.F;
    if (!has_targets) fail("backward needs a forward with targets before it, each time");
    has_targets = false;  // logits now hold their gradient: a second backward would be wrong
    buffer(Buffer::gradients);
    for (int64 r0 = 0; r0 < rows; r0 += head_rows) {
        const int64 part = std::min(head_rows, rows - r0);
        if (head_rows < rows) {  // they were overwritten by those of the next part
            linear(logits, u_final + r0 * D, head(), part);
            cross_entropy(losses + r0, logits, targets + r0, part, c.V, true, stream);
        }
        if (head_rows == rows) see_gradient(-1, "logits", logits, {B, T, c.V}, head().ld, float(scale / double(rows)));
        linear_backward(du + r0 * D, logits, u_final + r0 * D, head(), part, float(scale / double(rows)));
    }
    see_gradient(-1, "final_norm", du, {B, T, D});
    norm_residual_backward<A>(dx, g(Param::final_norm), nullptr, partial, nullptr, du, x_final, nullptr,
                              w(Param::final_norm), rstd_final, rows, D, stream);
    for (int64 i = c.L - 1; i >= 0; --i) {
        LayerActivations<A>& a = layers[size_t(i)];
        if (recompute && i + 1 < c.L) remake(i);
        see_gradient(i, "residual2", dx, {B, T, D});
        // x_out = res2 * x_mid + dropout(W_down swiglu(W_gate|up rmsnorm(x_mid)));  without dropout dm is dx itself
        if (dropout_on) dropout_backward(dm, dx, dropout(i, 1), rows * D, stream);
        A* d = dropout_on ? dm : dx;
        see_gradient(i, "ffn.out", d, {B, T, D});
        const Matrix& down = matrix(Param::down_proj, i);
        if (probe) {  // h's gradient, in its place: down_backward need not leave it in memory
            linear_backward_input(h, d, down, rows);
            see_gradient(i, "ffn.hidden", h, {B, T, F});
        }
        down_backward(blas, dgate_up, h, d, a.gate_up, data(down), rows, D, F, stream);
        linear_backward_weight(d, h, down, rows);
        see_gradient(i, "ffn.gate", dgate_up, {B, T, F}, 2 * F);
        see_gradient(i, "ffn.up", dgate_up + F, {B, T, F}, 2 * F);
        linear_backward(du, dgate_up, a.u2, matrix(Param::gate_proj, i), rows);
        see_gradient(i, "norm2", du, {B, T, D});
        norm_residual_backward(dx, g(Param::norm2, i), g(Param::res2, i), partial, dx, du, a.x_mid, w(Param::res2, i),
                               w(Param::norm2, i), a.rstd2, rows, D, stream);
        see_gradient(i, "residual1", dx, {B, T, D});
        // x_mid = res1 * x + dropout(W_o mixer(rmsnorm(x)))
        if (dropout_on) dropout_backward(dm, dx, dropout(i, 0), rows * D, stream);
        see_gradient(i, c.is_attention(i) ? "attn.out" : "ssd.out", d, {B, T, D});
        linear_backward(dy, d, a.y, mixer_out(i), rows);
        mixer_backward(i);
        see_gradient(i, "norm1", du, {B, T, D});
        norm_residual_backward(dx, g(Param::norm1, i), g(Param::res1, i), partial, dx, du, a.x, w(Param::res1, i),
                               w(Param::norm1, i), a.rstd1, rows, D, stream);
    }
    see_gradient(-1, "embedding", dx, {B, T, D});
    embedding_backward(g(Param::word_embed), dx, tokens, order, start, distinct, D, stream);
}

// dy -> du, and the gradients of the mixer's parameters
template <class A>
void Model<A>::mixer_backward(int64 i) {
    const Config& c = config;
    LayerActivations<A>& a = layers[size_t(i)];
    const int64 rows = B * T, H = c.H, N = c.N, P = c.P();
    const Matrix& projection = mixer_in(i);
    const int64 ld = projection.ld, pad = ld - projection.out;
    A *d = dproj, *proj = a.proj;
    if (c.is_attention(i)) {
        const int64 k = H * P, v = k + c.Hkv * P;
        const AttentionShape n{B, T, T, H, c.Hkv, P, ld, ld, T * ld};
        see_gradient(i, "attn.y", dy, {B, T, H, P});
        if (pad > 0) CHECK_CUDA(cudaMemsetAsync(d, 0, size_t(rows * ld) * sizeof(A), stream));
        attention_backward(d, d + k, d + v, attention_stats, dy, proj, proj + k, proj + v, a.y, a.lse, n, stream);
        rope(d, cos_qk, sin_qk, P, B, T, H + c.Hkv, ld, 0, true, stream);
    } else {
        const int64 b = H * N, x = 2 * H * N, dt = x + H * P;
        const SsdShape n{B, T, H, P, N, c.Q, ld};
        see_gradient(i, "ssd.y", dy, {B, T, H, P});
        Memory dS_T;  // of the final state: zero, but for a probe
        if (const float* cotangent = probe ? probe->final_state_cotangent(i) : nullptr) {
            float* to = dS_T.make<float>(B * H * P * N, "a cotangent");
            CHECK_CUDA(cudaMemcpy(to, cotangent, dS_T.size(), cudaMemcpyHostToDevice));
        }
        ssd_backward<A>(d, d + b, d + x, ddt, ddA, nullptr, segment_scratch, dy, dS_T.at<float>(), proj, proj + b,
                        proj + x, a.dt, a.dA, a.chunk_states, {cos_cb, sin_cb, 0}, n, tiles, stream);
        ssd_dt_backward(d + dt, g(Param::dt_bias, i), g(Param::A_log, i), partial, ddt, ddA, proj + dt,
                        w(Param::dt_bias, i), w(Param::A_log, i), a.dA, c.ssd_decay, rows, H, ld, pad, stream);
        see_gradient(i, "ssd.dA", ddA, {B, T, H});
        if (probe) see_dt_gradient(i);
    }
    if (probe) see_rotated("grad.", i, d, ld);
    linear_backward(du, d, a.u1, projection, rows);
}

// ---- for a probe

template <class A>
template <class X>
void Model<A>::show(const char* kind, int64 layer, const char* name, const X* tensor, const Shape& shape, int64 ld,
                    float scale) {
    int64 rows = 1, width = 1;
    for (size_t i = 0; i < shape.size(); ++i) (i < 2 ? rows : width) *= shape[i];
    std::vector<X> raw(size_t(rows * width));
    CHECK_CUDA(cudaMemcpy2DAsync(raw.data(), size_t(width) * sizeof(X), tensor, size_t(ld ? ld : width) * sizeof(X),
                                 size_t(width) * sizeof(X), size_t(rows), cudaMemcpyDeviceToHost, stream));
    CHECK_CUDA(cudaStreamSynchronize(stream));
    std::vector<float> values;
    values.reserve(raw.size());
    for (const X x : raw) values.push_back(scale * float(x));
    const std::string where = layer < 0 ? "" : "layers." + std::to_string(layer) + ".";
    probe->see(kind + where + name, values.data(), shape, width);
}

// What one product makes side by side, as it is and after RoPE: turned here on a copy, whoever turns it for the model.
// A gradient after RoPE is that before RoPE, turned by the same angles.
template <class A>
void Model<A>::see_rotated(const char* kind, int64 i, const A* proj, int64 ld) {
    const Config& c = config;
    const int64 H = c.H, N = c.N, P = c.P();
    Memory memory;
    A* turned = memory.make<A>(B * T * ld, "a copy");
    CHECK_CUDA(cudaMemcpyAsync(turned, proj, memory.size(), cudaMemcpyDeviceToDevice, stream));
    if (c.is_attention(i)) {
        const int64 k = H * P, v = k + c.Hkv * P;
        rope(turned, cos_qk, sin_qk, P, B, T, H + c.Hkv, ld, 0, false, stream);
        show(kind, i, "attn.q_before_rope", proj, {B, T, H, P}, ld, 1);
        show(kind, i, "attn.k_before_rope", proj + k, {B, T, c.Hkv, P}, ld, 1);
        show(kind, i, "attn.v", proj + v, {B, T, c.Hkv, P}, ld, 1);
        show(kind, i, "attn.q", turned, {B, T, H, P}, ld, 1);
        show(kind, i, "attn.k", turned + k, {B, T, c.Hkv, P}, ld, 1);
    } else {
        const int64 b = H * N, x = 2 * H * N;
        rope(turned, cos_cb, sin_cb, N, B, T, 2 * H, ld, 0, false, stream);
        show(kind, i, "ssd.C_before_rope", proj, {B, T, H, N}, ld, 1);
        show(kind, i, "ssd.B_before_rope", proj + b, {B, T, H, N}, ld, 1);
        show(kind, i, "ssd.X", proj + x, {B, T, H, P}, ld, 1);
        show(kind, i, "ssd.dt_raw", proj + x + H * P, {B, T, H}, ld, 1);
        show(kind, i, "ssd.C", turned, {B, T, H, N}, ld, 1);
        show(kind, i, "ssd.B", turned + b, {B, T, H, N}, ld, 1);
    }
}

// All of dt's gradient: ddt, which comes through dt X, and what comes through dA = -exp(A_log) dt.
template <class A>
void Model<A>::see_dt_gradient(int64 i) {
    const int64 H = config.H;
    std::vector<float> through_x = on_host(ddt, B * T * H);
    const std::vector<float> through_dA = on_host(ddA, B * T * H), A_log = on_host(w(Param::A_log, i), H);
    for (size_t r = 0; config.ssd_decay && r < through_x.size(); ++r)
        through_x[r] -= std::exp(A_log[r % size_t(H)]) * through_dA[r];
    probe->see("grad.layers." + std::to_string(i) + ".ssd.dt", through_x.data(), {B, T, H}, H);
}

// ---- everything else

template <class A>
double Model<A>::gradient_norm() {
    // Blocks of fixed size, so that the order of the sum does not depend on the GPU.
    const int64 block = 1 << 16, blocks = ceil_div(table.count, block);
    if (scratch.size() == 0) scratch.make<double>(blocks, "a sum");
    launch("gradient_norm", sum_of_squares_kernel, blocks, 256, 0, stream, scratch.at<double>(),
           buffer(Buffer::gradients), table.count, block);
    double total = 0;
    for (const double s : on_host(scratch.at<double>(), blocks)) total += s;
    return std::sqrt(total);
}

template <class A>
void Model<A>::update(const AdamW& o, double lr, int64 step, double grad_scale) {
    ++weights_version;
    launch("adamw", adamw_kernel<A>, adamw_tile_count, 256, 0, stream, buffer(Buffer::weights), copy.at<A>(),
           buffer(Buffer::exp_avg), buffer(Buffer::exp_avg_sq), buffer(Buffer::gradients), adamw_tiles.at<AdamWTile>(),
           adamw_rates(o, lr, step, grad_scale));
}

template <class A>
std::string Model<A>::find_non_finite() {
    using Index = unsigned long long;
    Memory where;
    Index* first = where.make<Index>(1, "an index");
    std::string bad;
    const auto look = [&](const std::string& name, const auto* v, int64 rows, int64 width, int64 ld) {
        if (!bad.empty() || !v) return;
        CHECK_CUDA(cudaMemsetAsync(first, 0xFF, sizeof *first, stream));
        launch("find_non_finite", first_bad_kernel<std::remove_cv_t<std::remove_pointer_t<decltype(v)>>>, 1024, 256, 0,
               stream, first, v, rows, width, ld);
        const Index i = on_host(first, 1)[0];
        if (i == ~Index(0)) return;
        const float value = float(on_host(v + int64(i) / width * ld + int64(i) % width, 1)[0]);
        bad = format("%s, element %llu, is %s", name.c_str(), i, std::isnan(value) ? "nan" : "infinite");
    };
    const auto look_parameters = [&](Buffer which, const char* what) {
        if (!has(which)) return;
        for (const ParamSpec& x : table.specs)
            look(format("%s %s", what, x.name.c_str()), buffer(which) + x.offset, 1, x.count, x.count);
    };
    look_parameters(Buffer::weights, "weight");
    if (carved == Purpose::training) {
        const int64 rows = B * T, D = config.D;
        for (size_t i = 0; i < layers.size(); ++i) {
            const LayerActivations<A>& a = layers[i];
            if (recompute) remake(int64(i));  // to be looked at: only inputs were kept
            const Matrix& projection = mixer_in(int64(i));
            const std::string at = format("activation layers.%zu ", i);
            look(at + "input", a.x, rows, D, D);
            look(at + "norm1 output", a.u1, rows, D, D);
            look(at + "mixer projection", a.proj, rows, projection.out, projection.ld);
            if (!config.is_attention(int64(i))) {
                const int64 H = config.H, PN = config.P() * config.N;
                look(at + "dt", a.dt, rows, H, H);
                look(at + "chunk state", a.chunk_states, B * H * ssd_chunks(tiles, T), PN, PN);
            }
            look(at + "mixer output", a.y, rows, D, D);
            look(at + "residual", a.x_mid, rows, D, D);
            look(at + "norm2 output", a.u2, rows, D, D);
            look(at + "gate and up", a.gate_up, rows, 2 * config.F, 2 * config.F);
        }
        look("activation final input", x_final, rows, D, D);
        if (head_rows == rows && has_targets)
            look("logits, or their gradient", logits, rows, config.V, padded8(config.V));
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
    for (const auto& k : known) {  // a word of the name: "L4" is not part of "L40"
        const size_t at = name.find(k.first), end = at + strlen(k.first);
        if (at != std::string::npos && (end >= name.size() || !isalnum((unsigned char)name[end]))) return k.second;
    }
    return 0;
}

static std::string gpu_name() {
    int index = 0;
    cudaDeviceProp p;
    CHECK_CUDA(cudaGetDevice(&index));
    CHECK_CUDA(cudaGetDeviceProperties(&p, index));
    return p.name;
}

template <class A>
class CudaEngine : public Engine {
  public:
    CudaEngine(const Config& c, bool recompute) : Engine(c), model(c, recompute) {}
    std::string device() const override {
        return format("%s, %s", gpu_name().c_str(), std::is_same<A, float>::value ? "fp32" : "bf16");
    }
    double peak() const override { return std::is_same<A, float>::value ? 0 : data_sheet_peak(device()); }
    std::string plan(int64 B, int64 T) override {
        const double fixed = (16 + (Model<A>::kCopy ? 2 : 0)) * double(table.count),
                     kept = double(model.bytes_for(B, T));
        return format("%s for %lld x %lld tokens (weights, gradients and moments %s, activations %s%s), the GPU has %s",
                      byte_text(fixed + kept).c_str(), (long long)B, (long long)T, byte_text(fixed).c_str(),
                      byte_text(kept).c_str(), model.recompute ? ", recomputed" : "",
                      byte_text(double(MemoryInfo().total)).c_str());
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
    std::vector<std::string> gemm_choices() const override { return model.gemm_choices(); }

    std::unique_ptr<State> new_state(int64 B, int64 capacity) const override {
        return std::make_unique<CudaState<A>>(config, B, capacity, &model);
    }
    void step(State& state, const int32_t* tokens, int64 n, float* logits, bool every_token) override {
        model.forward(tokens, nullptr, state.B, n, nullptr, &static_cast<CudaState<A>&>(state), logits, every_token);
    }
    void decode_greedy(State& state, const int32_t* last, int64 count, int64 vocab, int32_t* chosen) override {
        model.decode(&static_cast<CudaState<A>&>(state), last, count, vocab, nullptr, chosen);
    }
    // Through the reference's state on the host, so that there is one file format.
    void save_state(const State& state, const std::string& path) const override {
        ref::save_state(config, host_state(state), path);
    }
    ref::ModelState<float> host_state(const State& state) const {
        const auto& s = static_cast<const CudaState<A>&>(state);
        ref::ModelState<float> host(config, s.B, s.position);
        host.position = s.position;
        const int64 row = config.Hkv * config.P();
        for (size_t i = 0; i < s.layers.size(); ++i) {
            const auto& from = s.layers[i];
            auto& to = host.layers[i];
            if (from.S) to_host(to.S.data(), from.S, int64(to.S.size()), model.stream);
            else
                for (int64 b = 0; b < s.B; ++b)
                    for (const auto& part : {std::make_pair(to.k.data(), from.k), std::make_pair(to.v.data(), from.v)})
                        to_host(part.first + b * s.position * row, part.second + b * s.capacity * row, s.position * row,
                                model.stream);
        }
        return host;
    }
    std::unique_ptr<State> load_state(const std::string& path, int64 capacity) const override {
        const auto host = ref::load_state(config, path, capacity);
        auto s = std::make_unique<CudaState<A>>(config, host->B, capacity, &model);
        s->position = host->position;
        for (size_t i = 0; i < s->layers.size(); ++i) {
            const auto& from = host->layers[i];
            auto& to = s->layers[i];
            to_device(to.S, from.S.data(), int64(from.S.size()), model.stream);
            to_device(to.k, from.k.data(), int64(from.k.size()), model.stream);
            to_device(to.v, from.v.data(), int64(from.v.size()), model.stream);
        }
        return s;
    }
    void watch(ref::Probe<float>* probe) { model.probe = probe; }

  private:
    mutable Model<A> model;  // copying to the host needs the stream
    size_t bytes() const { return size_t(table.count) * sizeof(float); }
};

// ---------------------------------------------------------------------------------------------------------------------
// 14  Twins for tests: the launchers above on host arrays
// ---------------------------------------------------------------------------------------------------------------------
// Each rounds its inputs to A, runs the kernels that the model runs, and widens the outputs to float. What it lends to the
// launcher stands where the launcher's argument stands: a.out(y, n), f.in(w, n).

// Host arrays on the device, as numbers of type T. Where the host has none (null), or none yet (out), they are zeros.
template <class T>
class Arrays {
  public:
    using Number = T;
    T* in(const float* host, int64 n) { return place(host, nullptr, n); }
    T* in(const std::vector<float>& host) { return in(host.data(), int64(host.size())); }
    T* out(float* host, int64 n) { return place(nullptr, host, n); }
    T* inout(float* host, int64 n) { return place(host, host, n); }
    T* scratch(int64 n) { return place(nullptr, nullptr, n); }
    template <class X>
    X* exactly(const X* host, int64 n = 1) {
        X* to = room<X>(n);
        CHECK_CUDA(cudaMemcpy(to, host, size_t(n) * sizeof(X), cudaMemcpyHostToDevice));
        return to;
    }
    void bring_back() const {
        for (const auto& result : results) result();
    }

  private:
    std::deque<Memory> memory;
    std::vector<std::function<void()>> results;

    template <class X>
    X* room(int64 n) {
        Memory& m = memory.emplace_back();
        X* to = m.make<X>(std::max<int64>(1, n), "a test");
        CHECK_CUDA(cudaMemset(to, 0, m.size()));
        return to;
    }
    T* place(const float* from, float* back, int64 n) {
        T* to = room<T>(n);
        if (from) to_device(to, from, n, nullptr);
        if (back) results.push_back([=] { to_host(back, to, n, nullptr); });
        return to;
    }
};
// Calls body with a float or a bf16: in_precision(p, [&](auto a) { using A = decltype(a); ... });
template <class F>
static void in_precision(Precision p, F body) {
    if (p == Precision::fp32) body(float());
    else body(bf16());
    CHECK_CUDA(cudaDeviceSynchronize());
}
// Calls body(a, f): a lends arrays of A, f of fp32.
template <class F>
static void twin(Precision p, F body) {
    in_precision(p, [&](auto number) {
        Arrays<decltype(number)> a;
        Arrays<float> f;
        body(a, f);
        a.bring_back();
        f.bring_back();
    });
}

void linear_forward(Precision p, float* y, const float* x, const float* w, int64 rows, int64 in, int64 out) {
    twin(p, [&](auto& a, auto&) {
        Blas blas;
        linear_forward(blas, a.out(y, rows * out), out, a.in(x, rows * in), a.in(w, out * in), rows, in, out, nullptr);
    });
}
void linear_backward(Precision p, float* dx, float* dw, const float* dy, const float* x, const float* w, int64 rows,
                     int64 in, int64 out) {
    twin(p, [&](auto& a, auto& f) {
        Blas blas;
        auto* d = a.in(dy, rows * out);
        linear_backward_input(blas, a.out(dx, rows * in), d, out, a.in(w, out * in), rows, in, out, 1, nullptr);
        linear_backward_weight(blas, f.inout(dw, out * in), d, out, a.in(x, rows * in), rows, in, out, 1, nullptr);
    });
}
void embedding_forward(Precision p, float* x, const int32_t* tokens, const float* embed, int64 rows, int64 D, int64 V) {
    twin(p, [&](auto& a, auto& f) {
        embedding_forward(a.out(x, rows * D), f.exactly(tokens, rows), f.in(embed, V * D), rows, D, nullptr);
    });
}
void embedding_backward(Precision p, float* dembed, const float* dx, const int32_t* tokens, int64 rows, int64 D,
                        int64 V) {
    std::vector<int32_t> order, start;
    const int64 distinct = sort_by_token(&order, &start, tokens, rows, V);
    twin(p, [&](auto& a, auto& f) {
        embedding_backward(f.inout(dembed, V * D), a.in(dx, rows * D), f.exactly(tokens, rows),
                           f.exactly(order.data(), rows), f.exactly(start.data(), distinct + 1), distinct, D, nullptr);
    });
}
void residual_norm_forward(Precision p, float* out, float* u, float* rstd, const float* x, const float* m,
                           const float* w_res, const float* w_norm, double eps, const Dropout& dropout, int64 rows,
                           int64 D) {
    twin(p, [&](auto& a, auto& f) {
        residual_norm_forward(m ? a.out(out, rows * D) : nullptr, a.out(u, rows * D), f.out(rstd, rows),
                              a.in(x, rows * D), m ? a.in(m, rows * D) : nullptr, f.in(w_res, D), f.in(w_norm, D), eps,
                              dropout, rows, D, nullptr);
    });
}
void norm_residual_backward(Precision p, float* dx, float* dw_norm, float* dw_res, const float* dout, const float* du,
                            const float* x, const float* w_res, const float* w_norm, const float* rstd, int64 rows,
                            int64 D) {
    twin(p, [&](auto& a, auto& f) {
        auto* d = a.out(dx, rows * D);
        if (dout) to_device(d, dout, rows * D, nullptr);  // in place
        norm_residual_backward(d, f.inout(dw_norm, D), dout ? f.inout(dw_res, D) : nullptr,
                               f.scratch(kPartialBlocks * 2 * D), dout ? d : nullptr, a.in(du, rows * D),
                               a.in(x, rows * D), f.in(w_res, D), f.in(w_norm, D), f.in(rstd, rows), rows, D, nullptr);
    });
}
void dropout_backward(Precision p, float* dm, const float* dout, const Dropout& dropout, int64 n) {
    twin(p, [&](auto& a, auto&) { dropout_backward(a.out(dm, n), a.in(dout, n), dropout, n, nullptr); });
}
void rope(Precision p, float* x, const ref::RopeTable<float>& table, int64 B, int64 T, int64 H, int64 ld, int64 pos0,
          bool inverse) {
    twin(p, [&](auto& a, auto& f) {
        rope(a.inout(x, B * T * ld), f.in(table.cos), f.in(table.sin), table.d, B, T, H, ld, pos0, inverse, nullptr);
    });
}
// q begins its buffer; k and v lie either in the same buffer (k - q elements on) or, if seq_kv is not T * ld_q, in
// others.
void attention_forward(Precision p, float* y, float* lse, const float* q, const float* k, const float* v,
                       const AttentionShape& n) {
    twin(p, [&](auto& a, auto& f) {
        const bool together = n.seq_kv == n.T * n.ld_q;
        auto* at = a.in(q, n.B * n.T * n.ld_q);
        attention_forward(a.out(y, n.B * n.T * n.H * n.P), f.out(lse, n.B * n.T * n.H), at,
                          together ? at + (k - q) : a.in(k, n.B * n.seq_kv),
                          together ? at + (v - q) : a.in(v, n.B * n.seq_kv), n, n.S - n.T, nullptr);
    });
}
void attention_backward(Precision p, float* dq, float*, float*, const float* dy, const float* q, const float* k,
                        const float* v, const float* y, const float* lse, const AttentionShape& n) {
    twin(p, [&](auto& a, auto& f) {
        const int64 rows = n.B * n.T, width = n.H * n.P, to_k = k - q, to_v = v - q;
        auto *at = a.in(q, rows * n.ld_q), *d = a.out(dq, rows * n.ld_q);
        attention_backward(d, d + to_k, d + to_v, f.scratch(2 * n.B * n.H * padded_stats(n.T)), a.in(dy, rows * width),
                           at, at + to_k, at + to_v, a.in(y, rows * width), f.in(lse, rows * n.H), n, nullptr);
    });
}
void ssd_dt_forward(float* dt, float* dA, const float* dt_raw, const float* dt_bias, const float* A_log, bool decay,
                    int64 rows, int64 H, int64 ld) {
    twin(Precision::fp32, [&](auto&, auto& f) {
        ssd_dt_forward(f.out(dt, rows * H), f.out(dA, rows * H), f.in(dt_raw, rows * ld), f.in(dt_bias, H),
                       f.in(A_log, H), decay, rows, H, ld, nullptr);
    });
}
void ssd_dt_backward(float* ddt_raw, float* ddt_bias, float* dA_log, const float* ddt, const float* ddA,
                     const float* dt_raw, const float* dt_bias, const float* A_log, const float* dA, bool decay,
                     int64 rows, int64 H, int64 ld) {
    twin(Precision::fp32, [&](auto&, auto& f) {
        ssd_dt_backward(f.inout(ddt_raw, rows * ld), f.inout(ddt_bias, H), f.inout(dA_log, H),
                        f.scratch(kPartialBlocks * 2 * H), f.in(ddt, rows * H), f.in(ddA, rows * H),
                        f.in(dt_raw, rows * ld), f.in(dt_bias, H), f.in(A_log, H), f.in(dA, rows * H), decay, rows, H,
                        ld, 0, nullptr);
    });
}
template <class A>
static ResidualStream<A> stream_of(Arrays<A>& a, Arrays<float>& f, const ResidualTwin& r, int64 B, int64 D) {
    return {a.out(r.out, B * D), a.in(r.x, B * D), f.in(r.w_res, D), int(D), float(r.eps)};
}
void ssd_step(Precision p, float* Y, float* S, const float* proj, const ResidualTwin& residual, const float* dt_bias,
              const float* A_log, const ref::RopeTable<float>& table, int64 pos, bool decay, const SsdShape& n) {
    const DecodeCursor cursor{pos, 0};
    twin(p, [&](auto& a, auto& f) {
        ssd_step(a.out(Y, n.B * n.H * n.P), f.inout(S, n.B * n.H * n.P * n.N), a.in(proj, n.B * n.ld),
                 stream_of(a, f, residual, n.B, n.H * n.P), f.in(dt_bias, n.H), f.in(A_log, n.H), f.in(table.cos),
                 f.in(table.sin), decay, n, f.exactly(&cursor), nullptr);
    });
}
void attention_step(Precision p, float* y, float* k_cache, float* v_cache, const float* proj,
                    const ResidualTwin& residual, const ref::RopeTable<float>& table, int64 past, int64 splits,
                    const AttentionShape& n) {
    const DecodeCursor cursor{past, 0};
    twin(p, [&](auto& a, auto& f) {
        attention_step(a.out(y, n.B * n.H * n.P), f.scratch(n.B * n.H * splits * (n.P + 2)),
                       reinterpret_cast<unsigned*>(f.scratch(n.B * n.H)), a.inout(k_cache, n.B * n.seq_kv),
                       a.inout(v_cache, n.B * n.seq_kv), a.in(proj, n.B * n.ld_q),
                       stream_of(a, f, residual, n.B, n.H * n.P), f.in(table.cos), f.in(table.sin), n,
                       f.exactly(&cursor), splits, nullptr);
    });
}
void swiglu_step(Precision p, float* h, const float* gate_up, const ResidualTwin& residual, int64 B, int64 F, int64 D) {
    twin(p, [&](auto& a, auto& f) {
        swiglu_step(a.out(h, B * F), a.in(gate_up, B * 2 * F), stream_of(a, f, residual, B, D), B, F, nullptr);
    });
}
// RoPE's table on the device; null: none. It needs kSsdRopeRows positions.
static SsdRope angles(Arrays<float>& f, const ref::RopeTable<float>* table, int64 pos0) {
    if (!table) return {nullptr, nullptr, 0};
    return {f.in(table->cos), f.in(table->sin), pos0};
}
void ssd_chunked_forward(Precision p, float* Y, float* S_T, const float* sc, const float* sb, const float* sx,
                         const float* dt, const float* dA, const float* S_0, const ref::RopeTable<float>* table,
                         int64 pos0, const SsdShape& n) {
    twin(p, [&](auto& a, auto& f) {
        using A = typename std::remove_reference_t<decltype(a)>::Number;
        const int64 rows = n.B * n.T, states = n.B * n.H * n.P * n.N;
        const SsdTiles tiles = ssd_tiles<A>(n.N, n.P);
        const A* at = a.in(sc, rows * n.ld);
        float* last = f.out(S_T, states);
        if (S_T == S_0 && S_0) to_device(last, S_0, states, nullptr);  // in place
        const float* first = !S_0 ? nullptr : S_T == S_0 ? last : f.in(S_0, states);
        ssd_forward<A>(a.out(Y, rows * n.H * n.P), last, nullptr, f.scratch(ssd_scratch(n, tiles)), at, at + (sb - sc),
                       at + (sx - sc), f.in(dt, rows * n.H), f.in(dA, rows * n.H), first, angles(f, table, pos0), n,
                       tiles, nullptr);
    });
}
void ssd_chunked_backward(Precision p, float* dsc, float* ddt, float* ddA, float* dS_0, const float* dY,
                          const float* dS_T, const float* sc, const float* sb, const float* sx, const float* dt,
                          const float* dA, const float* S_0, const ref::RopeTable<float>* table, int64 pos0,
                          const SsdShape& n) {
    twin(p, [&](auto& a, auto& f) {
        using A = typename std::remove_reference_t<decltype(a)>::Number;
        const int64 rows = n.B * n.T, states = n.B * n.H * n.P * n.N, b = sb - sc, x = sx - sc;
        const SsdTiles tiles = ssd_tiles<A>(n.N, n.P);
        const SsdRope rope = angles(f, table, pos0);
        const A* at = a.in(sc, rows * n.ld);
        A *d = a.out(dsc, rows * n.ld), *kept = a.scratch(states * ssd_chunks(tiles, n.T));
        float *scratch = f.scratch(ssd_scratch(n, tiles)), *step = f.in(dt, rows * n.H), *log = f.in(dA, rows * n.H);
        ssd_forward<A>(a.scratch(rows * n.H * n.P), nullptr, kept, scratch, at, at + b, at + x, step, log,
                       S_0 ? f.in(S_0, states) : nullptr, rope, n, tiles, nullptr);
        ssd_backward<A>(d, d + b, d + x, f.out(ddt, rows * n.H), f.out(ddA, rows * n.H), f.out(dS_0, states), scratch,
                        a.in(dY, rows * n.H * n.P), dS_T ? f.in(dS_T, states) : nullptr, at, at + b, at + x, step, log,
                        kept, rope, n, tiles, nullptr);
    });
}
void swiglu_forward(Precision p, float* h, const float* gate_up, int64 rows, int64 F) {
    twin(p, [&](auto& a, auto&) { swiglu_forward(a.out(h, rows * F), a.in(gate_up, rows * 2 * F), rows, F, nullptr); });
}
void swiglu_backward(Precision p, float* dgate_up, const float* dh, const float* gate_up, int64 rows, int64 F) {
    twin(p, [&](auto& a, auto&) {
        swiglu_backward(a.out(dgate_up, rows * 2 * F), a.in(dh, rows * F), a.in(gate_up, rows * 2 * F), rows, F,
                        nullptr);
    });
}
void gate_up_forward(Precision p, float* h, float* gate_up, const float* x, const float* w, int64 rows, int64 D,
                     int64 F) {
    twin(p, [&](auto& a, auto&) {
        Blas blas;
        gate_up_forward(blas, a.out(h, rows * F), a.out(gate_up, rows * 2 * F), a.in(x, rows * D), a.in(w, 2 * F * D),
                        rows, D, F, nullptr);
    });
}
void down_backward(Precision p, float* dgate_up, float* h, const float* dy, const float* gate_up, const float* w_down,
                   int64 rows, int64 D, int64 F) {
    twin(p, [&](auto& a, auto&) {
        Blas blas;
        down_backward(blas, a.out(dgate_up, rows * 2 * F), a.out(h, rows * F), a.in(dy, rows * D),
                      a.in(gate_up, rows * 2 * F), a.in(w_down, D * F), rows, D, F, nullptr);
    });
}
// Rows of logits are padded8(V) apart; they become the gradient of the sum of the losses.
void cross_entropy(Precision p, float* losses, float* logits, const int32_t* targets, int64 rows, int64 V) {
    twin(p, [&](auto& a, auto& f) {
        cross_entropy(f.out(losses, rows), a.inout(logits, rows * padded8(V)), f.exactly(targets, rows), rows, V, true,
                      nullptr);
    });
}

// "" if there is a GPU that this program can use, else why not.
std::string problem() {
    struct Forget {
        ~Forget() { cudaGetLastError(); }  // so that the next call does not report it again
    } forget;
    int count = 0, driver = 0, device = 0, major = 0, minor = 0;
    const cudaError_t e = cudaGetDeviceCount(&count);
    if (e == cudaErrorInsufficientDriver) {
        cudaDriverGetVersion(&driver);
        if (driver == 0) return "no NVIDIA driver is installed";
        return format("the NVIDIA driver is too old: it supports CUDA %d.%d, this program was built with %d.%d",
                      driver / 1000, driver % 100 / 10, CUDART_VERSION / 1000, CUDART_VERSION % 100 / 10);
    }
    if (e == cudaErrorNoDevice || (e == cudaSuccess && count == 0)) return "no NVIDIA GPU was found";
    if (e != cudaSuccess) return std::string("the GPU cannot be used: ") + cudaGetErrorString(e);
    if (cudaGetDevice(&device) != cudaSuccess ||
        cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess)
        return "the GPU cannot be asked what it is";
    if (major < 8) return format("the GPU is too old: compute capability %d.%d, at least 8.0 is needed", major, minor);
    cudaFuncAttributes f;
    if (cudaFuncGetAttributes(&f, add_partials_kernel) != cudaSuccess)
        return format("this program was built for other GPUs: rebuild with make CUDA_ARCH=sm_%d%d", major, minor);
    return "";
}
static void need_gpu(const char* who) {
    const std::string why_not = problem();
    if (!why_not.empty()) fail("%s: %s", who, why_not.c_str());
}

}  // namespace cuda

std::unique_ptr<Engine> make_cuda_engine(const Config& c, Precision precision, bool recompute) {
    cuda::need_gpu("GPU");
    if (precision == Precision::fp32) return std::make_unique<cuda::CudaEngine<float>>(c, recompute);
    return std::make_unique<cuda::CudaEngine<cuda::bf16>>(c, recompute);
}

// ---------------------------------------------------------------------------------------------------------------------
// 15  Benchmark                                                                                      docs/benchmarks.md
// ---------------------------------------------------------------------------------------------------------------------
// A figure is the median of several runs. It is set beside what this GPU reaches in the same minute: the bytes per second of
// a copy, and the operations per second of a large matrix product. Bytes are what an op must move if it reads every input
// and writes every output once; operations are the model's own (flops_per_token), whatever the kernels do.

namespace cuda {

static Precision precision_of(const std::string& name) {
    if (name != "bf16" && name != "fp32") usage_error("--precision: '%s' is not bf16 or fp32", name.c_str());
    return name == "fp32" ? Precision::fp32 : Precision::bf16;
}

// ---- Measuring -------------------------------------------------------------------------------------------------------

static double elapsed_ms(const Profile& p, size_t i) {  // from mark i-1 to mark i
    float ms = 0;
    CHECK_CUDA(cudaEventElapsedTime(&ms, p.marks[i - 1].second, p.marks[i].second));
    return double(ms);
}

// Times f. First a call of no account, in which memory is laid out and algorithms are chosen, and calls until the GPU has done
// this work for a while: after a large product, say, its clock takes some time to rise again. Then `repeats` calls, but no
// more than fit into two seconds, and at least three. An event after each: kernels follow one another without gaps.
static constexpr double kWarmSeconds = 0.15;

static void measure(BenchRow* r, int64 repeats, const std::function<void()>& f) {
    f();
    CHECK_CUDA(cudaDeviceSynchronize());
    const double start = wall_seconds();
    double seconds;
    int64 calls = 0;
    do {
        f();
        CHECK_CUDA(cudaDeviceSynchronize());
        seconds = wall_seconds() - start;
        ++calls;
    } while (seconds < kWarmSeconds);
    const double once = seconds / double(calls);
    r->runs = std::min(repeats, std::max<int64>(3, int64(2 / once)));
    Profile marks;
    for (int64 i = 0; i <= r->runs; ++i) {
        if (i > 0) f();
        marks.mark("", nullptr);
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<double> ms;
    for (size_t i = 1; i < marks.marks.size(); ++i) ms.push_back(elapsed_ms(marks, i));
    std::sort(ms.begin(), ms.end());
    r->ms = ms[ms.size() / 2];
    r->ms_25 = ms[ms.size() / 4];
    r->ms_75 = ms[ms.size() - 1 - ms.size() / 4];
}

// n numbers on the GPU, uniform in low .. high: on zeros a product draws less power and runs faster than in earnest.
template <class A>
__global__ void random_kernel(A* x, int64 n, float low, float high) {
    const int64 i = int64(blockIdx.x) * blockDim.x + threadIdx.x;
    uint32_t c[4] = {uint32_t(i), uint32_t(i >> 32), 0, 0};
    philox(c, {1, 2});
    if (i < n) x[i] = from_float<A>(low + (high - low) * float(c[0] >> 8) * (1.0f / (1 << 24)));
}
template <class A>
static void randomize(A* x, int64 n, float low = -1, float high = 1) {
    if (n > 0) launch("random", random_kernel<A>, ceil_div(n, 256), 256, 0, nullptr, x, n, low, high);
}
template <class A>
struct Random : Memory {
    explicit Random(int64 n, float low = -1, float high = 1) { randomize(make<A>(n, "a test"), n, low, high); }
    operator A*() const { return at<A>(); }
};

// y = x, four times 16 bytes per thread; n is a multiple of 1024.
__global__ void copy_kernel(float4* y, const float4* x) {
    const int64 i = int64(blockIdx.x) * 1024 + threadIdx.x;
#pragma unroll
    for (int j = 0; j < 4; ++j) y[i + 256 * j] = x[i + 256 * j];
}

// ---- The cases -------------------------------------------------------------------------------------------------------

struct BenchSettings {  // what the options set
    std::string preset_name, precision = "bf16", csv, svg;
    Config config;
    int64 repeats = 10, decode_tokens = 128;
    int64 B = 4, T = 0, prompt = 64, decode_batch = 1;  // without a case
    std::string models = "all", lengths = "512,1024,2048,4096,8192,16384,32768,65536";
    std::string contexts = "512,4096,16384,65536", batches = "1,8,64";
    int64 step_tokens = 65536;
    bool recompute = false;
};

class Bench {
  public:
    const BenchSettings s;
    const Precision precision;
    std::vector<std::string> families = {"hybrid"};
    std::vector<int64> lengths, contexts, batches;  // of train, prefill, ssd and attention; of decode
    std::vector<BenchRow> rows;

    Bench(const BenchSettings& settings, Precision p) : s(settings), precision(p) {}
    void run(const std::string& kind);

  private:
    const Config& config = s.config;
    double copy_rate = 0, gemm_rate = 0;  // the ceilings, per second
    std::vector<int32_t> tokens;

    // The hybrid is the preset; the other two differ in which layers are attention, and in nothing else.
    Config family(const std::string& name) const {
        Config c = config;
        if (name == "transformer") c.attn_period = 1, c.attn_offset = 0;
        if (name == "ssm") c.attn_period = 0;
        return c;
    }
    static int64 attention_layers(const Config& c) {
        int64 n = 0;
        for (int64 i = 0; i < c.L; ++i) n += c.is_attention(i);
        return n;
    }
    std::unique_ptr<Engine> start(const Config& c) const {
        auto engine = make_cuda_engine(c, precision, s.recompute);
        engine->write(Buffer::weights, initial_weights(c, 1).data());
        return engine;
    }
    // Fills in a row and shows it. What cannot be done, for want of memory above all, is a row with a note; but a GPU that no
    // longer answers ends the program.
    void add(BenchRow r, const std::function<void(BenchRow*)>& fill);
    void ceilings();
    void train(const std::string& name);
    void launches(const char* kind, const std::string& model, int64 B, int64 T, const std::function<void()>& step);
    void prefill(const std::string& name);
    void decode(const std::string& name);
    template <class F>
    void layer(const char* kind, const std::string& model, F body);
    void ssd();
    void attention();
    void gemm();
};

void Bench::add(BenchRow r, const std::function<void(BenchRow*)>& fill) {
    try {
        fill(&r);
        r.copy_share = r.bytes / r.ms * 1e3 / copy_rate;
        r.gemm_share = r.flops / r.ms * 1e3 / gemm_rate;
    } catch (const UsageError&) {
        throw;
    } catch (const Error& e) {
        cudaGetLastError();
        if (cudaDeviceSynchronize() != cudaSuccess) throw;
        r.note = e.what();
    }
    const auto cell = [](double v, int width, int decimals, const char* unit = "") {
        return v > 0 && std::isfinite(v) ? format("%*.*f%s", width - int(strlen(unit)), decimals, v, unit)
                                         : std::string(size_t(width), ' ');
    };
    const std::string size = r.B == 0 ? "" : format("%6lld x %-6lld", (long long)r.B, (long long)r.T);
    printf("%-16s %-20s %-15s", r.model.c_str(), r.what.c_str(), size.c_str());
    if (!r.note.empty()) printf("  %s\n", r.note.c_str());
    else
        printf("%9.3f %9.3f..%-9.3f %9s %5s %5s %8s %5s %5s\n", r.ms, r.ms_25, r.ms_75,
               cell(r.tokens_per_s(), 9, 0).c_str(), cell(1e-9 * r.bytes / r.ms, 5, 2).c_str(),
               cell(100 * r.copy_share, 5, 0, "%").c_str(), cell(1e-9 * r.flops / r.ms, 8, 1).c_str(),
               cell(100 * r.gemm_share, 5, 0, "%").c_str(), cell(1e-9 * r.memory, 5, 1).c_str());
    fflush(stdout);
    rows.push_back(r);
}

// The two ceilings. The copy is of 4 GiB, or of what a small GPU has room for.
void Bench::ceilings() {
    in_precision(precision, [&](auto a) {
        using A = decltype(a);
        const int64 blocks = int64(std::min(size_t(4) << 30, MemoryInfo().free / 4) / (16 * 1024));
        add(BenchRow("ceilings", "", "copy", 0, 0), [&](BenchRow* r) {
            Random<float> x(blocks * 4096), y(blocks * 4096);
            r->bytes = 2 * 16384.0 * double(blocks);
            measure(r, 20, [&] {
                launch("copy", copy_kernel, blocks, 256, 0, nullptr, (float4*)(float*)y, (const float4*)(float*)x);
            });
            copy_rate = 1e3 * r->bytes / r->ms;
        });
        add(BenchRow("ceilings", "", "product of 8192^3", 0, 0), [&](BenchRow* r) {
            const int64 n = 8192;
            Blas blas;
            Random<A> x(n * n), w(n * n), y(n * n);
            r->flops = 2 * double(n) * double(n) * double(n);
            measure(r, 20, [&] { linear_forward<A, A>(blas, y, n, x, w, n, n, n, nullptr); });
            gemm_rate = 1e3 * r->flops / r->ms;
        });
    });
}

// A training step (gradients zeroed, forward, backward, norm, AdamW) and an evaluation, at constant tokens.
void Bench::train(const std::string& name) {
    const Config c = family(name);
    const std::string model = s.preset_name + " " + name;
    std::unique_ptr<Engine> engine;
    const double free_before = double(MemoryInfo().free);
    int64 steps = 0, shown = lengths[0];  // the length whose launches are listed: the one next to the model's own
    for (const int64 T : lengths)
        if (std::abs(std::log(double(T) / double(c.T))) < std::abs(std::log(double(shown) / double(c.T)))) shown = T;
    for (const int64 T : lengths) {
        const int64 B = s.step_tokens / T;
        const auto train_step = [&] {
            engine->zero_gradients();
            engine->forward(tokens.data(), tokens.data() + 1, B, T);
            engine->backward(1);
            const double norm = engine->gradient_norm();
            engine->update(AdamW(), 1e-4, ++steps, norm > 1 ? 1 / norm : 1);
        };
        add(BenchRow("train", model, "step", B, T), [&](BenchRow* r) {
            if (!engine) engine = start(c);
            r->flops = flops_per_token(c, T) * r->tokens;
            measure(r, s.repeats, train_step);
            r->memory = free_before - double(MemoryInfo().free);
        });
        if (!rows.back().note.empty()) continue;
        add(BenchRow("train", model, "evaluation", B, T), [&](BenchRow* r) {
            r->flops = flops_per_token(c, T) * r->tokens / 3;
            measure(r, s.repeats, [&] { engine->forward(tokens.data(), tokens.data() + 1, B, T); });
        });
        if (T == shown) launches("launches", model, B, T, train_step);
    }
}

// One more step with an event after each launch: how long each kind of launch took in all.
void Bench::launches(const char* kind, const std::string& model, int64 B, int64 T, const std::function<void()>& step) {
    Profile marks;
    struct Off {  // also when the step fails
        ~Off() { profile = nullptr; }
    };
    {
        const Off off;
        profile = &marks;
        marks.mark("", nullptr);
        step();
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    std::vector<BenchRow> kinds;
    double total = 0;
    for (size_t i = 1; i < marks.marks.size(); ++i) {
        const std::string& what = marks.marks[i].first;
        auto r = std::find_if(kinds.begin(), kinds.end(), [&](const BenchRow& k) { return k.what == what; });
        if (r == kinds.end()) {
            r = kinds.insert(r, BenchRow(kind, model, what, B, T));
            r->ms = 0;
        }
        ++r->runs;
        r->ms += elapsed_ms(marks, i);
        total += elapsed_ms(marks, i);
    }
    std::sort(kinds.begin(), kinds.end(), [](const BenchRow& a, const BenchRow& b) { return a.ms > b.ms; });
    printf("\n%-28s %8s %10s %7s\n", "launch", "times", "ms", "share");
    for (const BenchRow& r : kinds) {
        printf("%-28s %8lld %10.3f %6.1f%%\n", r.what.c_str(), (long long)r.runs, r.ms, 100 * r.ms / total);
        rows.push_back(r);
    }
    printf("%-28s %8s %10.3f\n\n", "all", "", total);
}

// Whole sequences into an empty state, at constant tokens; logits of the last token of each.
void Bench::prefill(const std::string& name) {
    const Config c = family(name);
    std::unique_ptr<Engine> engine;
    for (const int64 T : lengths) {
        const int64 B = s.step_tokens / T;
        add(BenchRow("prefill", s.preset_name + " " + name, "prefill", B, T), [&](BenchRow* r) {
            if (!engine) engine = start(c);
            const auto state = engine->new_state(B, T);
            std::vector<float> logits(size_t(B * c.V));
            r->flops = (flops_per_token(c, T) / 3 - 2 * double(c.V * c.D)) * r->tokens + 2 * double(B * c.V * c.D);
            measure(r, s.repeats, [&] {
                state->position = 0;
                engine->step(*state, tokens.data(), T, logits.data());
            });
        });
    }
}

// One token of each of B sequences after T others, greedy: the state is read, every weight, and K and V of what came before.
// The state is made of random numbers: to read 64 sequences of 65,536 tokens would take longer than the rest.
void Bench::decode(const std::string& name) {
    const Config c = family(name);
    std::unique_ptr<Engine> engine;
    const double element = precision == Precision::bf16 ? 2 : 4;
    const int64 attention = attention_layers(c);
    for (const int64 B : batches)
        for (const int64 T : contexts)
            add(BenchRow("decode", s.preset_name + " " + name, "token", B, T), [&](BenchRow* r) {
                if (!engine) engine = start(c);
                r->tokens = double(B);
                r->bytes = element * double(engine->table.count - (c.tie ? 0 : c.V * c.D)) +
                           double(attention) * element * 2 * double(B * T * c.Hkv * c.P()) +
                           double(c.L - attention) * 4 * 2 * double(B * c.H * c.P() * c.N);
                const auto state = engine->new_state(B, T + s.decode_tokens + 2);
                in_precision(precision, [&](auto a) {
                    for (auto& layer : static_cast<CudaState<decltype(a)>&>(*state).layers) {
                        const int64 cached = B * state->capacity * c.Hkv * c.P();
                        if (layer.S) randomize(layer.S, B * c.H * c.P() * c.N);
                        if (layer.k) randomize(layer.k, cached);
                        if (layer.v) randomize(layer.v, cached);
                    }
                });
                state->position = T;
                // Several tokens at a time, as a program that samples greedily has them decoded.
                const int64 run = std::min<int64>(16, s.decode_tokens);
                std::vector<int32_t> next(static_cast<size_t>(B), 1), chosen(size_t(B * run));
                const auto step = [&] {
                    state->position = T;
                    engine->decode_greedy(*state, next.data(), run, c.V, chosen.data());
                };
                measure(r, std::max<int64>(3, s.decode_tokens / run), step);
                for (double* ms : {&r->ms, &r->ms_25, &r->ms_75}) *ms /= double(run);
                if (batches.size() * contexts.size() == 1) launches("token launches", r->model, B, T, step);
            });
}

struct Cost {
    double bytes, operations;
};
// One layer's kernels alone, at all lengths: forward, backward, and both. body(row, a number of the precision's type, time),
// where time(forward, its cost, backward, its cost) does the pass that is asked for.
template <class F>
void Bench::layer(const char* kind, const std::string& model, F body) {
    const char* const passes[] = {"forward", "backward", "forward + backward"};
    for (const int64 T : lengths)
        for (const int pass : {0, 1, 2})
            add(BenchRow(kind, model, passes[pass], s.step_tokens / T, T), [&](BenchRow* r) {
                const auto time = [&](auto forward, Cost there, auto backward, Cost back) {
                    r->bytes = (pass != 1 ? there.bytes : 0) + (pass != 0 ? back.bytes : 0);
                    r->flops = (pass != 1 ? there.operations : 0) + (pass != 0 ? back.operations : 0);
                    forward();
                    measure(r, s.repeats, [&] {
                        if (pass != 1) forward();
                        if (pass != 0) backward();
                    });
                };
                in_precision(precision, [&](auto a) { body(*r, a, time); });
            });
}

// As training runs them: C, B, X, dt, dA in, Y out; and the gradients of all of these.
void Bench::ssd() {
    const int64 H = config.H, N = config.N, P = config.P(), ld = padded32(config.ssd_width());
    layer("ssd", format("H%lld P%lld N%lld", (long long)H, (long long)P, (long long)N),
          [&](const BenchRow& r, auto a, auto time) {
              using A = decltype(a);
              const int64 T = r.T, heads = r.B * T * H, b = H * N, x = 2 * H * N;  // heads of all tokens
              const SsdShape n{r.B, T, H, P, N, config.Q, ld};
              const SsdTiles tiles = ssd_tiles<A>(N, P);
              Random<A> p(r.B * T * ld), d(r.B * T * ld), y(heads * P), dy(heads * P),
                  kept(r.B * H * ssd_chunks(tiles, T) * P * N);
              Random<float> dt(heads, 0.001f, 0.1f), dA(heads, -0.5f, 0), ddt(heads), ddA(heads),
                  scratch(ssd_scratch(n, tiles)), cos(std::max(T, kSsdRopeRows) * N / 2),
                  sin(std::max(T, kSsdRopeRows) * N / 2);
              const SsdRope rope{cos, sin, 0};
              const double in = double(heads) * double(int64(sizeof(A)) * (2 * N + P) + 8),
                           out = double(heads * P) * sizeof(A), operations = 4 * double(heads * N * P);
              time(
                  [&] {
                      ssd_forward<A>(y, nullptr, kept, scratch, p, p + b, p + x, dt, dA, nullptr, rope, n, tiles,
                                     nullptr);
                  },
                  Cost{in + out, operations},
                  [&] {
                      ssd_backward<A>(d, d + b, d + x, ddt, ddA, nullptr, scratch, dy, nullptr, p, p + b, p + x, dt, dA,
                                      kept, rope, n, tiles, nullptr);
                  },
                  Cost{2 * in + out, 2 * operations});
          });
}

// q, k, v in, y out; and their gradients. Operations of the backward as is the custom: 5 products, the scores a second time
// among them, against 2 of the forward.
void Bench::attention() {
    const int64 H = config.H, Hkv = config.Hkv, P = config.P(), ld = padded32(config.attn_width());
    const std::string groups = Hkv < H ? format("/%lld", (long long)Hkv) : "";
    layer("attention", format("H%lld%s P%lld", (long long)H, groups.c_str(), (long long)P),
          [&](const BenchRow& r, auto a, auto time) {
              using A = decltype(a);
              if (P > kAttentionMaxP) fail("heads of %lld: at most %lld", (long long)P, (long long)kAttentionMaxP);
              const int64 T = r.T, rows_ = r.B * T, k = H * P, v = k + Hkv * P;
              const AttentionShape n{r.B, T, T, H, Hkv, P, ld, ld, T * ld};
              Random<A> p(rows_ * ld), d(rows_ * ld), y(rows_ * H * P), dy(rows_ * H * P);
              Random<float> lse(rows_ * H), stats(2 * r.B * H * padded_stats(T));
              const double in = double(rows_ * (H + 2 * Hkv) * P) * sizeof(A), out = double(rows_ * H * P) * sizeof(A),
                           operations = 2 * double(rows_ * H * P) * double(T + 1);
              time([&] { attention_forward<A>(y, lse, p, p + k, p + v, n, 0, nullptr); }, Cost{in + out, operations},
                   [&] { attention_backward<A>(d, d + k, d + v, stats, dy, p, p + k, p + v, y, lse, n, nullptr); },
                   Cost{2 * in + 2 * out, 2.5 * operations});
          });
}

// Every matrix product of a step of the hybrid, alone; and what all of them take together.
void Bench::gemm() {
    const Config& c = config;
    const int64 attention = attention_layers(c);
    const struct {
        const char* name;
        int64 in, out, times;
    } products[] = {{"[C|B|X|dt]", c.D, c.ssd_width(), c.L - attention},
                    {"[q|k|v]", c.D, c.attn_width(), attention},
                    {"mixer out", c.D, c.D, c.L},
                    {"[gate|up]", c.D, 2 * c.F, c.L},
                    {"down", c.F, c.D, c.L},
                    {"head", c.D, c.V, 1}};
    const char* const what[] = {"y = x W'", "dx = dy W", "dW += dy' x"};
    for (const int pass : {0, 1, 2}) {
        BenchRow all = BenchRow("gemm", "all of a step", what[pass], 1, s.step_tokens);
        all.ms = all.ms_25 = all.ms_75 = all.tokens = 0;
        for (const auto& m : products) {
            if (m.times == 0) continue;
            add(BenchRow("gemm", m.name, what[pass], 1, s.step_tokens), [&](BenchRow* r) {
                in_precision(precision, [&](auto a) {
                    using A = decltype(a);
                    const int64 M = s.step_tokens, ld = m.out == c.V ? padded8(m.out) : padded32(m.out);
                    const int64 out = sizeof(A) == 2 ? ld : m.out;  // as in Model
                    Blas blas;
                    Random<A> x(M * m.in), w(ld * m.in), y(M * ld);
                    Random<float> dw(ld * m.in);
                    r->tokens = 0;
                    r->flops = 2 * double(M) * double(m.in) * double(m.out);
                    r->bytes = sizeof(A) * double(M * (m.in + m.out)) +
                               (pass < 2 ? double(sizeof(A)) : 8.0) * double(m.in * m.out);
                    measure(r, s.repeats, [&] {
                        if (pass == 0) linear_forward<A, A>(blas, y, ld, x, w, M, m.in, out, nullptr);
                        if (pass == 1) linear_backward_input<A>(blas, x, y, ld, w, M, m.in, out, 1, nullptr);
                        if (pass == 2) linear_backward_weight<A>(blas, dw, y, ld, x, M, m.in, out, 1, nullptr);
                    });
                });
            });
            const BenchRow& r = rows.back();
            for (const auto x : {&BenchRow::ms, &BenchRow::ms_25, &BenchRow::ms_75, &BenchRow::flops})
                all.*x += double(m.times) * r.*x;
        }
        if (std::isfinite(all.ms)) add(all, [](BenchRow*) {});
    }
}

void Bench::run(const std::string& kind) {
    if (tokens.empty()) {
        const Philox stream(1, "bench");
        tokens.resize(size_t(s.step_tokens + 1));
        for (size_t r = 0; r < tokens.size(); ++r) tokens[r] = int32_t(stream.at(r).word[0] % uint32_t(config.V));
    }
    printf("\n%-37s %15s %9s %20s %9s %5s %5s %8s %5s %5s\n", kind.c_str(), kind == "decode" ? "B after T" : "B x T",
           "ms", "middle half", "tokens/s", "TB/s", "copy", "TFLOP/s", "GEMM", "GB");
    if (kind == "ceilings") ceilings();
    else if (kind == "ssd") ssd();
    else if (kind == "attention") attention();
    else if (kind == "gemm") gemm();
    else
        for (const std::string& name : families) {
            if (kind == "train") train(name);
            else if (kind == "prefill") prefill(name);
            else decode(name);
        }
}

// ---- The command -----------------------------------------------------------------------------------------------------

// "hybrid,ssm": its words.
static std::vector<std::string> bench_words(const std::string& text) {
    std::vector<std::string> words;
    for (size_t at = 0; at <= text.size();) {
        const size_t end = std::min(text.find(',', at), text.size());
        words.push_back(text.substr(at, end - at));
        at = end + 1;
    }
    return words;
}
// "512,1024": integers of low .. high.
static std::vector<int64> bench_list(const char* option, const std::string& text, int64 low, int64 high) {
    std::vector<int64> list;
    for (const std::string& word : bench_words(text)) {
        int64 v = 0;
        if (!parse_int(word, &v)) usage_error("--%s: '%s' is not an integer", option, word.c_str());
        if (v < low || v > high)
            usage_error("--%s: %s is outside %lld..%lld", option, word.c_str(), (long long)low, (long long)high);
        list.push_back(v);
    }
    return list;
}

static void add_bench_options(Options* o, BenchSettings* s) {
    o->add("preset", &s->preset_name, "the model; default: 5m, for a case 320m; the options below change it");
    add_model_options(o, &s->config);
    o->section("Measuring");
    o->add("precision", &s->precision, "bf16 or fp32");
    o->add("recompute", &s->recompute, "train with less memory for more work");
    o->add("repeats", &s->repeats, "timed runs; fewer, but at least 3, where they take over two seconds", 1, 1000);
    o->add("tokens", &s->decode_tokens, "tokens to decode; 0: none", 0, 1 << 24);
    o->add("csv", &s->csv, "FILE: write every figure");
    o->add("svg", &s->svg, "FILE: draw them");
    o->section("Without a case");
    o->add("batch", &s->B, "sequences of a train step", 1, 1 << 20);
    o->add("seq-len", &s->T, "tokens of a sequence; 0: the preset's", 0, 1 << 24);
    o->add("prompt", &s->prompt, "tokens before decoding", 1, 1 << 24);
    o->add("decode-batch", &s->decode_batch, "sequences to decode at once", 1, 1 << 20);
    o->section("With a case");
    o->add("model", &s->models,
           "hybrid, transformer, ssm (the preset with all or no layers attention), several by commas, or all");
    o->add("lengths", &s->lengths, "tokens of a sequence");
    o->add("step-tokens", &s->step_tokens, "tokens of a step, at every length", 1, INT32_MAX - 1);
    o->add("contexts", &s->contexts, "tokens before the decoded ones");
    o->add("batches", &s->batches, "sequences to decode at once");
}

int bench_command(int argc, char** argv) {
    const char* const usage =
        "usage: transxssm bench [CASE] [options]\n\n"
        "Times the model on this GPU: medians, set beside what a copy and a large matrix product reach here.\n\n"
        "    (no case)       training, evaluation, the launches of a step and decoding, at one size\n"
        "    train           training and evaluation at several lengths, and the launches of a step\n"
        "    prefill         sequences read into a state\n"
        "    decode          a token after contexts of several lengths\n"
        "    ssd, attention  the kernels of one layer\n"
        "    gemm            the matrix products of a step\n"
        "    all             all of these cases\n"
        "    plot FILE...    nothing is timed: what --csv wrote earlier is drawn to --svg\n";
    const std::vector<std::string> known = {"train", "prefill", "decode", "ssd", "attention", "gemm", "all", "plot"};
    BenchSettings s;
    std::vector<std::string> words;
    {  // the preset sets the defaults of the options that change it: it is looked for first
        Options first("transxssm", usage);
        add_bench_options(&first, &s);
        if (!first.parse(argc, argv, 1, &words)) return 0;
    }
    const std::string kind = words.empty() ? "" : words[0];
    const std::string name = !s.preset_name.empty() ? s.preset_name : kind.empty() ? "5m" : "320m";
    s = BenchSettings();
    s.config = preset(s.preset_name = name);
    Options o("transxssm", usage);
    add_bench_options(&o, &s);
    words.clear();
    o.parse(argc, argv, 1, &words);
    if (o.given("heads") && !o.given("kv-heads")) s.config.Hkv = s.config.H;

    if (!kind.empty() && std::find(known.begin(), known.end(), kind) == known.end())
        usage_error("bench: unknown case '%s'; did you mean '%s'?", kind.c_str(), nearest_word(kind, known).c_str());
    if (kind != "plot" && words.size() > 1)
        usage_error("bench %s: unexpected word '%s'", kind.c_str(), words[1].c_str());
    for (const char* option : {"batch", "seq-len", "prompt", "decode-batch"})
        if (!kind.empty() && o.given(option)) usage_error("--%s is of the bench without a case", option);
    for (const char* option : {"model", "lengths", "step-tokens", "contexts", "batches"})
        if (kind.empty() && o.given(option)) usage_error("--%s is of a case: bench train, say", option);
    const Precision precision = precision_of(s.precision);
    const std::vector<std::string> all_families = {"hybrid", "transformer", "ssm"},
                                   families = s.models == "all" ? all_families : bench_words(s.models);
    for (const std::string& family : families)
        if (std::find(all_families.begin(), all_families.end(), family) == all_families.end())
            usage_error("--model: '%s' is not hybrid, transformer, ssm or all", family.c_str());
    if ((kind == "decode" || kind == "all") && s.decode_tokens == 0)
        usage_error("--tokens: 0 leaves nothing to decode");

    const int64 length = s.T > 0 ? s.T : s.config.T;  // without a case
    if (kind.empty()) s.step_tokens = s.B * length;
    Bench bench(s, precision);
    if (kind.empty()) {
        bench.lengths = {length};
        bench.contexts = {s.prompt};
        bench.batches = {s.decode_batch};
    } else {
        for (const int64 T : bench_list("lengths", s.lengths, 1, o.given("lengths") ? s.step_tokens : INT32_MAX))
            if (T <= s.step_tokens) bench.lengths.push_back(T);  // by default those that a step has room for
        if (bench.lengths.empty()) bench.lengths = {s.step_tokens};
        bench.contexts = bench_list("contexts", s.contexts, 1, 1 << 24);
        bench.batches = bench_list("batches", s.batches, 1, 1 << 20);
        bench.families = families;
    }
    if (s.step_tokens >= INT32_MAX) usage_error("%lld tokens a step: at most 2^31-2", (long long)s.step_tokens);
    for (const std::string& out : {s.csv, s.svg})  // now, not after the work
        if (!out.empty() && (is_directory(out) || access(parent_directory(out).c_str(), W_OK) != 0))
            fail("%s: cannot write: %s", out.c_str(), is_directory(out) ? strerror(EISDIR) : strerror(errno));
    if (kind == "plot") {
        for (const std::string& given : o.given_names())
            if (given != "svg") usage_error("bench plot: --%s has no meaning, nothing is timed", given.c_str());
        if (words.size() < 2 || s.svg.empty()) usage_error("bench plot: expected FILE... --svg FILE");
        for (size_t i = 1; i < words.size(); ++i) read_bench_csv(words[i], &bench.rows);
        replace_file(s.svg, bench_svg(bench.rows));
        return 0;
    }
    s.config.validate("bench");
    need_gpu("bench");
    printf("%s, %s; %s, %s parameters\n", gpu_name().c_str(), s.precision.c_str(), name.c_str(),
           with_commas(ParamTable(s.config).count).c_str());
    std::vector<std::string> todo = {"ceilings"};
    if (kind.empty()) todo.push_back("train");
    else if (kind != "all") todo.push_back(kind);
    else todo.insert(todo.end(), known.begin(), known.end() - 2);
    if (kind.empty() && s.decode_tokens > 0) todo.push_back("decode");
    for (const std::string& k : todo) {
        bench.run(k);
        if (!s.csv.empty()) replace_file(s.csv, bench_csv(bench.rows));
        if (!s.svg.empty()) replace_file(s.svg, bench_svg(bench.rows));
    }
    return 0;
}

}  // namespace cuda

// ---------------------------------------------------------------------------------------------------------------------
// 16  A candidate for the oracle: what the kernels make, beside the numbers of ref_cpu.cpp                docs/oracle.md
// ---------------------------------------------------------------------------------------------------------------------
// Weights, tokens and the model's shape come from an oracle file; every tensor that the engine has goes into another one
// under the same name, for `ref_cpu compare`. The engine has no cs and no states at the reference's chunks: its kernels
// choose their own chunks and keep such numbers on chip.

namespace cuda {

// Notes what the model shows.
struct Candidate : ref::Probe<float> {
    struct Tensor {
        Shape shape;
        std::vector<float> values;
    };
    std::vector<std::pair<std::string, Tensor>> tensors;
    std::vector<std::pair<std::string, int64>> counts;
    std::map<int64, std::vector<float>> cotangents;  // by layer
    bool everything = true;                          // false: of the activations only logits and losses

    void note(const std::string& name, const std::vector<float>& values, const Shape& shape) {
        tensors.push_back({name, {shape, values}});
    }
    void see(const std::string& name, float* data, const Shape& shape, int64) override {  // rows without gaps
        if (everything || name == "logits" || name == "losses") note(name, {data, data + element_count(shape)}, shape);
    }
    const float* final_state_cotangent(int64 layer) const override {
        const auto found = cotangents.find(layer);
        return found == cotangents.end() ? nullptr : found->second.data();
    }
    const Tensor& at(const std::string& name) const {
        for (const auto& t : tensors)
            if (t.first == name) return t.second;
        fail("the engine has no tensor '%s'", name.c_str());
    }
};

static const std::string& metadata_of(const SafeTensors& file, const char* key) {
    const auto found = file.metadata.find(key);
    if (found == file.metadata.end())
        fail("%s: header: __metadata__.%s is missing: not an oracle file", file.path.c_str(), key);
    return found->second;
}
static const SafeTensors::Entry& entry(const SafeTensors& file, const std::string& name, const Shape& shape) {
    const SafeTensors::Entry* e = file.find(name);
    if (!e) fail("%s: tensor '%s' is missing", file.path.c_str(), name.c_str());
    if (!shape.empty() && e->shape != shape)
        fail("%s: tensor '%s' has shape %s, expected %s", file.path.c_str(), name.c_str(), to_text(e->shape).c_str(),
             to_text(shape).c_str());
    return *e;
}

// As the reference's run_decode: S tokens at once, then one by one.
template <class A>
static void decode_candidate(CudaEngine<A>& engine, Candidate* out, const std::vector<int32_t>& tokens, int64 B,
                             int64 T) {
    const Config& c = engine.config;
    for (const int64 split : std::set<int64>{1, c.Q - 1, c.Q, c.Q + 1}) {
        if (split < 1 || split >= T) continue;
        const int64 end = std::min(split + 4, T);
        const auto state = engine.new_state(B, end);
        while (state->position < end) {
            const int64 from = state->position, n = from == 0 ? split : 1;
            std::vector<int32_t> next;
            for (int64 b = 0; b < B; ++b)
                next.insert(next.end(), tokens.begin() + b * T + from, tokens.begin() + b * T + from + n);
            std::vector<float> logits(size_t(B * c.V));
            engine.step(*state, next.data(), n, logits.data(), false);
            const std::string at = format("decode.split_%lld.after_%lld.", (long long)split, (long long)(from + n));
            out->counts.emplace_back(at + "position", state->position);
            const ref::ModelState<float> host = engine.host_state(*state);
            for (int64 i = 0; i < c.L; ++i) {
                const auto& layer = host.layers[size_t(i)];
                const std::string name = at + format("layers.%lld.", (long long)i);
                const Shape cache = {B, state->position, c.Hkv, c.P()};
                if (c.is_attention(i)) out->note(name + "k", layer.k, cache);
                if (c.is_attention(i)) out->note(name + "v", layer.v, cache);
                if (!c.is_attention(i)) out->note(name + "ssm_state", layer.S, {B, c.H, c.P(), c.N});
            }
            out->note(at + "logits", logits, {B, c.V});
        }
    }
}

// As the reference's run_adamw: steps on the same tokens, without the final states in the objective.
static void adamw_candidate(Engine& engine, Candidate* out, const std::vector<int32_t>& tokens,
                            const std::vector<int32_t>& targets, int64 B, int64 T, const SafeTensors& oracle) {
    const std::string at = oracle.path + ": __metadata__.adamw";
    const Json settings = Json::parse(metadata_of(oracle, "adamw"), at);
    const auto number = [&](const char* key) {
        const Json* j = settings.find(key);
        if (!j || j->type != Json::Number) fail("%s: %s is missing or not a number", at.c_str(), key);
        return j->number;
    };
    const AdamW rule{number("beta1"), number("beta2"), number("eps"), number("weight_decay")};
    const int64 steps = int64(number("steps"));
    if (steps == 0) return;
    std::vector<float> losses, norms, w(size_t(engine.table.count));
    std::vector<std::vector<float>> param_norms(engine.table.specs.size());
    for (int64 step = 1; step <= steps; ++step) {
        engine.zero_gradients();
        losses.push_back(float(engine.forward(tokens.data(), targets.data(), B, T)));
        engine.backward(1);
        const double norm = engine.gradient_norm(), clip = number("clip");
        norms.push_back(float(norm));
        engine.update(rule, number("lr"), step, clip > 0 && norm > clip ? clip / norm : 1);
        engine.read(Buffer::weights, w.data());
        for (size_t k = 0; k < param_norms.size(); ++k) {
            const ParamSpec& s = engine.table.specs[k];
            double squares = 0;
            for (int64 i = s.offset; i < s.offset + s.count; ++i)
                squares += double(w[size_t(i)]) * double(w[size_t(i)]);
            param_norms[k].push_back(float(std::sqrt(squares)));
        }
    }
    out->note("adamw.loss", losses, {steps});
    out->note("adamw.grad_norm", norms, {steps});
    for (size_t k = 0; k < param_norms.size(); ++k)
        out->note("adamw.param_norm." + engine.table.specs[k].name, param_norms[k], {steps});
}

template <class A>
static void compute_candidate(const SafeTensors& oracle, Candidate* out) {
    const Config c = Config::from_json(
        Json::parse(metadata_of(oracle, "config"), oracle.path + ": __metadata__.config"), oracle.path + ": config");
    const Shape shape = entry(oracle, "tokens", {}).shape;
    if (shape.size() != 2)
        fail("%s: tensor 'tokens' has shape %s, expected (B,T)", oracle.path.c_str(), to_text(shape).c_str());
    const int64 B = shape[0], T = shape[1];
    const auto ids = [&](const char* name) {
        std::vector<double> wide(size_t(B * T));
        oracle.read_integers(entry(oracle, name, shape), wide.data());
        return std::vector<int32_t>(wide.begin(), wide.end());
    };
    const std::vector<int32_t> tokens = ids("tokens"), targets = ids("targets");
    CudaEngine<A> engine(c, false);
    std::vector<float> w(size_t(engine.table.count));
    for (const ParamSpec& s : engine.table.specs) oracle.read(entry(oracle, s.name, s.shape), &w[size_t(s.offset)]);
    engine.write(Buffer::weights, w.data());
    out->everything = oracle.find("embedding") != nullptr;
    for (int64 i = 0; i < c.L; ++i) {
        const std::string name = format("cotangent.layers.%lld.ssd.final_state", (long long)i);
        if (!oracle.find(name)) continue;
        out->cotangents[i].resize(size_t(B * c.H * c.P() * c.N));
        oracle.read(entry(oracle, name, {B, c.H, c.P(), c.N}), out->cotangents[i].data());
    }

    engine.watch(out);
    const double loss = engine.forward(tokens.data(), targets.data(), B, T, nullptr);
    double objective = loss;
    for (const auto& g : out->cotangents) {
        const auto& final_state = out->at(format("layers.%lld.ssd.final_state", (long long)g.first)).values;
        for (size_t k = 0; k < g.second.size(); ++k) objective += double(g.second[k]) * double(final_state[k]);
    }
    out->note("loss", {float(loss)}, {});
    out->note("objective", {float(objective)}, {});
    engine.zero_gradients();
    engine.backward(1);
    engine.watch(nullptr);
    std::vector<float> g(size_t(engine.table.count));
    engine.read(Buffer::gradients, g.data());
    for (const ParamSpec& s : engine.table.specs)
        out->note("grad." + s.name, {g.begin() + s.offset, g.begin() + s.offset + s.count}, s.shape);
    bool decode = false;
    for (const SafeTensors::Entry& e : oracle.entries) decode = decode || e.name.compare(0, 7, "decode.") == 0;
    if (decode) decode_candidate(engine, out, tokens, B, T);
    adamw_candidate(engine, out, tokens, targets, B, T, oracle);
}

int candidate_command(int argc, char** argv) {
    std::string to, precision = "bf16";
    std::vector<std::string> files;
    Options o("transxssm",
              "usage: transxssm candidate ORACLE.safetensors --out FILE.safetensors [--precision fp32]\n\n"
              "Computes on the GPU what `ref_cpu oracle` wrote, from the same weights and tokens; for\n"
              "    ref_cpu compare ORACLE.safetensors FILE.safetensors --dtype bf16 --partial");
    o.add("out", &to, "FILE.safetensors");
    o.add("precision", &precision, "bf16 or fp32");
    if (!o.parse(argc, argv, 1, &files)) return 0;
    if (files.size() != 1) usage_error("candidate: expected one oracle file, found %zu", files.size());
    if (to.empty()) usage_error("candidate: --out is missing");
    const bool fp32 = precision_of(precision) == Precision::fp32;
    if (same_file(files[0], to)) usage_error("--out: %s is read from: give another name", to.c_str());
    const SafeTensors oracle(files[0]);
    if (metadata_of(oracle, "kind") != "model")
        fail("%s: is of the op %s, expected a model", files[0].c_str(), metadata_of(oracle, "kind").c_str());
    need_gpu("GPU");

    Candidate out;
    if (fp32) compute_candidate<float>(oracle, &out);
    else compute_candidate<bf16>(oracle, &out);
    std::vector<std::pair<std::string, std::string>> metadata;
    for (const auto& m : oracle.metadata)
        if (m.first != "noise") metadata.emplace_back(m.first, m.first == "precision" ? precision : m.second);
    std::vector<TensorView> views;
    for (const auto& t : out.tensors) views.push_back({t.first, DType::F32, t.second.shape, t.second.values.data()});
    for (const auto& n : out.counts) views.push_back({n.first, DType::I64, {}, &n.second});
    write_safetensors(to, views, metadata);
    printf("%s: %s, %zu tensors\n", to.c_str(), precision.c_str(), views.size());
    return 0;
}

}  // namespace cuda

// ---------------------------------------------------------------------------------------------------------------------
// 17  main
// ---------------------------------------------------------------------------------------------------------------------

#else
int main(int argc, char** argv) {
    return run_main("transxssm", [&] {
        const std::string command = argc > 1 ? argv[1] : "--help";
        if (command == "bench") return cuda::bench_command(argc - 1, argv + 1);
        if (command == "candidate") return cuda::candidate_command(argc - 1, argv + 1);
        if (command == "--help" || command == "-h") {
            printf(
                "transxssm: TransXSSM on an NVIDIA GPU.\n\n%s"
                "    bench [CASE]          time training, decoding, kernels and products on this GPU\n"
                "    candidate ORACLE      every number of a pass on this GPU, for ref_cpu compare\n\n"
                "transxssm COMMAND --help lists a command's options.\n",
                model_command_help());
            return 0;
        }
        return model_command("transxssm", argc - 1, argv + 1, {"bf16", "fp32"},
                             [](const Config& c, const std::string& precision) {
                                 return make_cuda_engine(c, precision == "fp32" ? Precision::fp32 : Precision::bf16);
                             },
                             {"bench", "candidate"});
    });
}
#endif
