// transxssm.h: the contract. What the model is, what its parts are called, and what an engine can do.
//
// TransXSSM (arXiv 2506.09507) is a language model that stacks state-space layers and attention layers and gives both
// the same positions: one Unified RoPE turns attention's q and k and the state space's C and B.
//
// THE MODEL IN TEN LINES                                                          shapes
//     x = E[token]                                                                (B,T,D)
//     for layer i in 0..L-1:
//         u = rmsnorm(x) * norm1
//         m = attention(u)  if i % attn_period == attn_offset  else  ssd(u)
//         x = res1 * x + dropout(m)                      learned skip per channel
//         u = rmsnorm(x) * norm2
//         x = res2 * x + dropout(W_down (silu(W_gate u) * (W_up u)))
//     logits = W_head (rmsnorm(x) * normf)                                        (B,T,V)
//     loss = mean over tokens of -log softmax(logits)[target]
//
//     attention(u): q, k = rope(W_q u), rope(W_k u);  v = W_v u;  y_t = sum_{s<=t} softmax_s(q_t.k_s / sqrt(P)) v_s
//     ssd(u):       C, B = rope(W_C u), rope(W_B u);  X = W_X u;  dt = softplus(W_dt u + dt_bias)
//                   S_t = exp(-exp(A_log) dt_t) S_{t-1} + dt_t X_t (x) B_t;  y_t = S_t C_t
//     both:         m = W_o concat_heads(y)
//
// THE DUALITY IN ONE LINE: attention's (q, k, v) are the state space's (C, B, X).
//     attention  y_t = sum_s softmax(q_t.k_s) v_s           keeps every k and v: its cache grows with T
//     SSD        y_t = sum_s decay(t,s) (C_t.B_s) dt_s X_s  is linear, so that all of the past fits in one S (P,N)
//
// GLOSSARY
//     B batch   T tokens of a sequence   D width   L layers   F feed-forward width   V vocabulary
//     H heads   Hkv key/value heads (attention; query head h reads head h / (H/Hkv))   P = D/H head dimension
//     N state size per SSD head   Q chunk length   NC = ceil(T/Q) chunks
//     C, B, X   in code sc, sb, sx        dt step size        dA = -exp(A_log) dt, the log of the decay
//     cs        inclusive cumulative sum of dA inside a chunk     S state (P,N) of a head
//     Matrices are row-major; a weight is (out, in) and y = x W^T. No biases but dt_bias.
//
// READING ORDER  this file; ref_cpu.cpp, the same model in loops; train.cpp; docs/ beside them. common.h holds the
// small pieces (errors, JSON, tensor files, options, random numbers) and can wait.
#pragma once

#include "common.h"

// ---------------------------------------------------------------------------------------------------------------------
// Configuration
// ---------------------------------------------------------------------------------------------------------------------

struct Config {
    // field                config.json key (the published code's)   meaning
    int64 V = 256;  // vocab_size
    int64 D = 128;  // hidden_size                  model width
    int64 L = 4;    // num_hidden_layers
    int64 H = 4;    // num_attention_heads          heads of both kinds of layer; P = D/H must be even
    int64 Hkv = 4;  // num_key_value_heads          divides H
    int64 N = 32;   // ssd_state_size               even
    int64 F = 320;  // intermediate_size
    int64 T = 256;  // max_position_embeddings      the length it is trained at; decoding may go on beyond
    int64 Q = 64;   // ssd_chunk_size
    int64 attn_period =
        8;  // attn_layer_period            0: no attention layer at all, 1 with offset 0: only attention
    int64 attn_offset = 7;  // attn_layer_offset
    double rope_theta = 10000;
    double norm_eps = 1e-6;  // rms_norm_eps
    double dropout = 0;      // hidden_dropout
    bool tie = true;         // tie_word_embeddings         the head is the embedding
    bool ssd_decay = true;   // ssd_decay                   false: a_t = 1, equation (7) of the paper taken literally

    int64 P() const { return D / H; }
    bool is_attention(int64 layer) const { return attn_period > 0 && layer % attn_period == attn_offset; }
    int64 chunks(int64 tokens) const { return (tokens + Q - 1) / Q; }

    // Widths of the projections that share an input and so are one matrix product: [C|B|X|dt] and [q|k|v].
    int64 ssd_width() const { return 2 * H * N + D + H; }
    int64 attn_width() const { return D + 2 * Hkv * P(); }

    void validate(const std::string& where = "") const;  // throws Error naming the field; `where` begins the message
    Json to_json() const;                                // the keys of config.json
    static Config from_json(const Json&, const std::string& where);  // validated; refuses what has no counterpart here
};

// tiny: learns in a minute on two CPU cores.   5m: the CPU benchmark model.   10m: character-level GPT size.
// 320m, 1.3b: the paper's. Throws UsageError for any other name.
Config preset(const std::string& name);
std::vector<std::string> preset_names();
// --layers, --d-model, ... : every program's options that describe a model.
void add_model_options(Options*, Config*);

// ---------------------------------------------------------------------------------------------------------------------
// The one parameter table: drives allocation, initialisation, weight decay, file names and messages
// ---------------------------------------------------------------------------------------------------------------------

enum class Param {
    // clang-format off
    word_embed,                                                     // (V,D)
    norm1,                                                          // (D)       u = rmsnorm(x) * norm1
    c_proj, b_proj, x_proj, dt_proj, dt_bias, A_log, out_proj,      // SSD:       (HN,D) (HN,D) (D,D) (H,D) (H) (H) (D,D)
    q_proj, k_proj, v_proj, o_proj,                                 // attention: (D,D) (Hkv P,D) (Hkv P,D) (D,D)
    res1,                                                           // (D)       x = res1 * x + m
    norm2, gate_proj, up_proj, down_proj, res2,                     // (D) (F,D) (F,D) (D,F) (D)
    final_norm, lm_head,                                            // (D) (V,D); no lm_head when tied
    // clang-format on
};

// Initial values: normal(0, 0.02), ones, log of uniform [1,16], inverse softplus of log-uniform dt in [1e-3, 1e-1].
enum class Init { normal, ones, a_log, dt_bias };

struct ParamSpec {
    std::string name;  // as in model.safetensors
    Param param;
    int64 layer;  // -1 outside the layers
    Shape shape;
    Init init;
    bool decay;    // weight decay: 2-D parameters only
    int64 offset;  // in elements, into one flat buffer; neighbours lie without gaps, so that C,B,X,dt (q,k,v; gate,up)
    int64 count;   //   are the rows of one matrix
};

struct ParamTable {
    std::vector<ParamSpec> specs;  // in the order of computation
    int64 count = 0;               // elements in all

    explicit ParamTable(const Config&);
    int64 offset(Param p, int64 layer = -1) const;
    const ParamSpec* find(const std::string& name) const;
    const ParamSpec& at(int64 element) const;  // the parameter that owns an element of the flat buffer

  private:
    static constexpr int64 kParams = int64(Param::lm_head) + 1;
    std::vector<int64> index;  // offset of (layer + 1, param), -1 where the layer has no such parameter
};

// The initial weights, a pure function of (config, seed): every engine starts from the same bits.
std::vector<float> initial_weights(const Config&, uint64_t seed);

// ---------------------------------------------------------------------------------------------------------------------
// The engine: what train, sample and eval need, and nothing else
// ---------------------------------------------------------------------------------------------------------------------

// What a model remembers of the tokens it has consumed. Each engine derives its own; the contents are the same:
//     SSD layer        S (B,H,P,N) after the last consumed token
//     attention layer  K after RoPE and V, (B,position,Hkv,P) each
struct State {
    int64 B = 1;         // sequences
    int64 capacity = 0;  // room for K and V, in tokens
    int64 position = 0;  // tokens consumed so far
    virtual ~State() = default;
};

// Where the dropout masks come from. Element e of a tensor (rows,D) is dropped if word e % 4 of the Philox block
// (seed, "dropout") at counter words (low 32 bits of e/4, step, micro_batch, site << 8 | e/4 >> 32) is below p *
// 2^32, where site = 2 * layer + {0 mixer, 1 feed-forward}. Every engine compares the same integers.
struct DropoutKey {
    uint64_t seed;
    uint32_t step, micro_batch;
};

struct AdamW {
    double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, weight_decay = 0.01;
};

enum class Buffer { weights, gradients, exp_avg, exp_avg_sq };

class Engine {
  public:
    const Config config;
    const ParamTable table;

    explicit Engine(const Config& c) : config(c), table(c) {}
    virtual ~Engine() = default;
    virtual std::string device() const = 0;  // for a person: "CPU, 2 threads, fp32"
    // What a GPU has to say beyond that: matrix operations per second by its data sheet (0: not known), and the
    // memory that training on (B,T) takes ("": nothing to say).
    virtual double peak() const { return 0; }
    virtual std::string plan(int64 /*B*/, int64 /*T*/) { return ""; }

    // Copies all of a buffer (table.count floats, in table order) from or to the host.
    virtual void write(Buffer, const float* host) = 0;
    virtual void read(Buffer, float* host) const = 0;

    // Training, by micro-batches. forward: tokens and targets are (B,T), every sequence starts from the zero state;
    // returns the mean loss in nats per token. backward ADDS scale * d(mean loss of the last forward) to the gradients.
    virtual double forward(const int32_t* tokens, const int32_t* targets, int64 B, int64 T,
                           const DropoutKey* dropout = nullptr) = 0;
    virtual void backward(double scale) = 0;
    virtual void zero_gradients() = 0;
    virtual double gradient_norm() = 0;  // L2 over all parameters
    // One AdamW step (decoupled decay, bias correction for `step` = 1, 2, ...) with gradients times grad_scale.
    virtual void update(const AdamW&, double lr, int64 step, double grad_scale) = 0;
    // The first tensor, in the order of computation (weights, activations, gradients), with a NaN or an infinity, and
    // where; "" if all is finite.
    virtual std::string find_non_finite() const = 0;
    // How the matrix products so far are computed, one line for each: a rule chooses it, and the bits of a result depend
    // on it. Empty where there is but one way.
    virtual std::vector<std::string> gemm_choices() const { return {}; }

    // Inference. step consumes n >= 1 further tokens of each sequence, tokens (B,n), and writes the logits after the
    // last, (B,V), or after every one, (B,n,V). Any split of a text into steps gives the same result up to rounding.
    virtual std::unique_ptr<State> new_state(int64 B, int64 capacity) const = 0;
    virtual void step(State&, const int32_t* tokens, int64 n, float* logits, bool every_token = false) = 0;
    // Greedy decoding. Each sequence consumes its token of `last`, (B), and then, count - 1 times, the one it chose: that
    // of the greatest of the first `vocab` logits, the lower id among equals. chosen: (B,count).
    virtual void decode_greedy(State&, const int32_t* last, int64 count, int64 vocab, int32_t* chosen);
    // State files: layers.I.ssm_state, layers.I.k, layers.I.v, position, batch (docs/format.md).
    virtual void save_state(const State&, const std::string& path) const = 0;
    virtual std::unique_ptr<State> load_state(const std::string& path, int64 capacity) const = 0;
};

std::unique_ptr<Engine> make_cpu_engine(const Config&);

// On the GPU (transxssm.cu): activations and matrix products in bf16 with fp32 sums, or everything in fp32. Throws if
// there is no GPU that it can use. Only in builds with CUDA (WITH_CUDA).
enum class Precision { fp32, bf16 };
// recompute: keep only each layer's input for the backward pass and make its other activations again there.
std::unique_ptr<Engine> make_cuda_engine(const Config&, Precision, bool recompute = false);
namespace cuda {
std::string problem();                         // "" if there is a GPU that can be used, else why not
int bench_command(int argc, char** argv);      // transxssm bench
int candidate_command(int argc, char** argv);  // transxssm candidate
}  // namespace cuda

// ---------------------------------------------------------------------------------------------------------------------
// Model directories, tokenizer, sampling: shared by all programs
// ---------------------------------------------------------------------------------------------------------------------

// Text to token ids and back. Implementations: tokenizer.cpp.
class Tokenizer {
  public:
    virtual ~Tokenizer() = default;
    virtual int64 vocab_size() const = 0;
    virtual std::vector<int32_t> encode(const std::string& text) const = 0;
    virtual std::string bytes_of(int32_t id) const = 0;  // the bytes of one token; throws if id is outside
    virtual int32_t end_of_text() const { return -1; }   // -1: it has none
    virtual std::string json() const = 0;                // contents of tokenizer.json
    std::string decode(const std::vector<int32_t>& ids) const {
        std::string s;
        for (const int32_t id : ids) s += bytes_of(id);
        return s;
    }
};
std::unique_ptr<Tokenizer> make_byte_tokenizer();                      // id = byte
std::unique_ptr<Tokenizer> load_tokenizer(const std::string& file);    // a tokenizer.json
std::unique_ptr<Tokenizer> open_tokenizer(const std::string& choice);  // "bytes" or a file

// A checkpoint directory: config.json, model.safetensors, tokenizer.json (and, from the trainer, more). DIR may be a
// run's OUT, whose file `latest` names the directory, or the directory itself; resolve_checkpoint returns the latter.
std::string resolve_checkpoint(const std::string& dir);
std::string read_name(const std::string& file);  // what `latest` or `best` holds; "" if it is not there
std::string strip_slashes(std::string path);     // without those at the end
Config load_config(const std::string& dir);
std::vector<float> load_weights(const std::string& dir, const Config&);  // checks names, shapes, finiteness
void save_model(const std::string& dir, const Config&, const float* weights, const Tokenizer&);
// To and from files of the published PyTorch module (docs/format.md). OUT must not exist; it is made whole or not at all.
void export_model(const std::string& dir, const std::string& out);
void import_model(const std::string& dir, const std::string& out);

struct Sampler {
    double temperature = 0.8;  // 0: greedy
    int64 top_k = 0;           // keep the k most probable tokens; 0: all
    double top_p = 1;          // then keep the smallest set of most probable tokens whose probability reaches top_p
    double min_p = 0;          // then drop tokens less probable than min_p times the most probable
    uint64_t seed = 1;

    void add_options(Options*);
    // Chooses among the first `vocab` logits; `draw` is the number of the random draw. Ties fall to the lower id.
    int32_t choose(const float* logits, int64 vocab, uint64_t draw) const;
};

// Feeds the prompt, then samples `count` tokens, handing the bytes of each to `out`. Stops at the end-of-text token.
void generate(Engine&, const Tokenizer&, const std::string& prompt, int64 count, const Sampler&,
              const std::function<void(const std::string& bytes)>& out);

// Mean loss over `tokens`, in disjoint windows of T predicted tokens, each from the zero state, the short last one
// included; batches of B windows. Also the number of predicted tokens and of the bytes they stand for.
struct Evaluation {
    double nats_per_token = 0;
    int64 tokens = 0, bytes = 0;
    double perplexity() const { return std::exp(nats_per_token); }
    double bits_per_byte() const { return nats_per_token * double(tokens) / (std::log(2.0) * double(bytes)); }
};
Evaluation evaluate(Engine&, const Tokenizer&, const std::vector<int32_t>& tokens, int64 B, int64 T);

// "layer 0-6 ssd, 7 attention", parameters, memory: what `info` and `--dry-run` print. B = T = 0 leaves memory out.
std::string describe(const Config&, int64 B, int64 T);
// Operations that training one token takes in the model's own terms, whatever the engine does: 6 per weight of a
// matrix that multiplies, and three times the forward's scores and values, or state updates and reads.
double flops_per_token(const Config&, int64 T);

// Curves or stacked bars as SVG: the training loss, and the benchmark's figures. Labels name the colours in a legend on the
// right. Points that are not finite are left out, and points outside the axes lie on their ends.
struct Plot {
    struct Curve {
        std::string label;                              // "": not in the legend
        std::vector<std::pair<double, double>> points;  // (x,y)
        std::string color;                              // "": the next of fourteen
        double width = 2;                               // 0: no line
        bool dots = true;
    };
    std::string title, x_label, y_label;
    std::vector<Curve> curves;
    std::vector<std::string> bars;  // names: x = 0, 1, ... counts them, and the curves are their parts, stacked
    bool log_x = false;             // powers of 2
    double x_low = NAN, x_high = NAN, y_low = NAN, y_high = NAN;  // of the axes; NaN: what the points need
    Plot() = default;
    Plot(const std::string& t, const std::string& x, const std::string& y) : title(t), x_label(x), y_label(y) {}
};
std::string plots_svg(const std::vector<Plot>&);  // one below the other

// A figure of `transxssm bench`: the median time of something, and what was done in that time.
struct BenchRow {
    std::string kind, model, what;              // the case ("train"); "320m hybrid", ...; "step", "forward", ...
    std::string engine = "transxssm";           // who did it
    int64 B = 0, T = 0;                         // sequences and their tokens (decode: those before the timed one)
    int64 runs = 0;                             // how many were timed
    double ms = NAN, ms_25 = NAN, ms_75 = NAN;  // their median and quarter points
    double tokens = 0, bytes = 0, flops = 0;    // of one run; 0: not counted
    double memory = 0;                          // bytes that the GPU held
    double copy_share = NAN, gemm_share = NAN;  // bytes and flops per second over what a copy and a product reach
    std::string note;                           // why there is no figure

    BenchRow() = default;
    BenchRow(const std::string& k, const std::string& m, const std::string& w, int64 sequences, int64 length)
        : kind(k), model(m), what(w), B(sequences), T(length), tokens(double(sequences) * double(length)) {}
    double tokens_per_s() const { return 1e3 * tokens / ms; }
};
std::string bench_csv(const std::vector<BenchRow>&);
void read_bench_csv(const std::string& path, std::vector<BenchRow>*);  // appends what plots need
std::string bench_svg(const std::vector<BenchRow>&);

// The commands `sample`, `eval`, `info`, `export` and `import` of ref_cpu and transxssm, on any engine. argv[0] is the command.
// The first of `precisions` is the engine's default.
using EngineFactory = std::function<std::unique_ptr<Engine>(const Config&, const std::string& precision)>;
int model_command(const std::string& program, int argc, char** argv, const std::vector<std::string>& precisions,
                  const EngineFactory&,
                  const std::vector<std::string>& other_commands = {});  // the program's own, for "did you mean"
const char* model_command_help();

// ---------------------------------------------------------------------------------------------------------------------
// Training (train.cpp): the pure functions, for tests
// ---------------------------------------------------------------------------------------------------------------------

// The first token of one row's window, in 0 .. tokens - T - 1; rows count through all micro-batches of a step.
int64 window_start(uint64_t seed, int64 step, int64 row, int64 tokens, int64 T);
// Warm-up and cosine; step = 0 .. steps - 1.
double learning_rate(int64 step, int64 steps, double peak, double warmup_frac, double min_frac);

struct LogRow {  // a line of log.csv
    int64 step, tokens;
    double train_loss, val_loss, lr, grad_norm, tokens_per_s;  // val_loss: NaN where there was no evaluation
};
std::string loss_svg(const std::vector<LogRow>&, int64 steps, const std::string& title);

int train_main(int argc, char** argv);

// ---------------------------------------------------------------------------------------------------------------------
// The layers of the CPU reference, for tests, the oracle and readers (ref_cpu.cpp; T is float or double)
// ---------------------------------------------------------------------------------------------------------------------
// Order of arguments: outputs, inputs, parameters, saved values, dimensions. A gradient has the name of its tensor
// after a d. Gradients of parameters, and of tensors that several ops read, are ADDED to (+=); other gradients are
// set (=).

namespace ref {

// Shapes of one SSD call. sc and sb are rows of H*N, sx rows of H*P, `ld` elements apart (they lie in one buffer); Y is
// (B,T,H*P), dt and dA (B,T,H), states (B,H,P,N), chunk_states (B,H,NC,P,N).
struct SsdShape {
    int64 B, T, H, P, N, Q, ld;
};
// Shapes of one attention call. q has B*T rows `ld_q` apart, k and v S rows `ld_kv` apart for each sequence and
// `seq_kv` from one sequence to the next. Query t stands at position S-T+t and sees keys 0..S-T+t. y is (B,T,H*P), lse
// (B,T,H).
struct AttentionShape {
    int64 B, T, S, H, Hkv, P, ld_q, ld_kv, seq_kv;
};
// cos and sin of pos * theta^(-2j/d) for j < d/2, computed in double and rounded once; (positions, d/2) each.
template <class T>
struct RopeTable {
    int64 d = 0, positions = 0;
    std::vector<T> cos, sin;
    void extend(int64 dim, double theta, int64 count);  // makes at least `count` positions available
};

// C (M,N) = A (M,K) B (K,N), or += if accumulate. ld: row stride as stored; a transposed operand is stored (K,M) or
// (N,K).
enum class Layout { plain, transposed };
template <class T>
void matmul(T* c, int64 ldc, const T* a, int64 lda, Layout la, const T* b, int64 ldb, Layout lb, int64 M, int64 N,
            int64 K, bool accumulate);
// y (rows,out) = x (rows,in) W^T
template <class T>
void linear_forward(T* y, const T* x, const T* w, int64 rows, int64 in, int64 out);
// dx = dy W (or += ), dw += dy^T x
template <class T>
void linear_backward(T* dx, T* dw, const T* dy, const T* x, const T* w, int64 rows, int64 in, int64 out,
                     bool accumulate_dx);

template <class T>
void embedding_forward(T* x, const int32_t* tokens, const T* embed, int64 rows, int64 D);
template <class T>
void embedding_backward(T* dembed, const T* dx, const int32_t* tokens, int64 rows, int64 D);
template <class T>
void rmsnorm_forward(T* u, T* rstd, const T* x, const T* w, double eps, int64 rows, int64 D);
template <class T>
void rmsnorm_backward(T* dx, T* dw, const T* du, const T* x, const T* w, const T* rstd, int64 rows, int64 D);
// Rotates H heads of d elements in place, in B*T rows `ld` apart, from position pos0 on; inverse undoes it (=
// backward).
template <class T>
void rope(T* x, const RopeTable<T>& table, int64 B, int64 T_, int64 H, int64 ld, int64 pos0, bool inverse);
template <class T>
void attention_forward(T* y, T* lse, const T* q, const T* k, const T* v, const AttentionShape&);
// dq, dk, dv have the layout of q, k, v.
template <class T>
void attention_backward(T* dq, T* dk, T* dv, const T* dy, const T* q, const T* k, const T* v, const T* y, const T* lse,
                        const AttentionShape&);

// dt = softplus(dt_raw + dt_bias), dA = -exp(A_log) dt (0 without decay). dt_raw has rows `ld` apart.
template <class T>
void ssd_dt_forward(T* dt, T* dA, const T* dt_raw, const T* dt_bias, const T* A_log, bool decay, int64 rows, int64 H,
                    int64 ld);
template <class T>
void ssd_dt_backward(T* ddt_raw, T* ddt_bias, T* dA_log, const T* ddt, const T* ddA, const T* dt_raw, const T* dt_bias,
                     const T* A_log, const T* dA, bool decay, int64 rows, int64 H, int64 ld);
// The three forms of SSD. S_0 and S_T (and their gradients) may be null: zero, or not wanted.
template <class T>
void ssd_recurrent_forward(T* Y, T* S_T, const T* sc, const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0,
                           const SsdShape&);
template <class T>
void ssd_quadratic_forward(T* Y, T* S_T, const T* sc, const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0,
                           const SsdShape&);
template <class T>
void ssd_chunked_forward(T* Y, T* S_T, T* chunk_states, const T* sc, const T* sb, const T* sx, const T* dt, const T* dA,
                         const T* S_0, const SsdShape&);
// dsc, dsb, dsx have the layout of sc, sb, sx; ddt is the part through dt X only, ddA the gradient of dA.
template <class T>
void ssd_recurrent_backward(T* dsc, T* dsb, T* dsx, T* ddt, T* ddA, T* dS_0, const T* dY, const T* dS_T, const T* sc,
                            const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0, const SsdShape&);
template <class T>
void ssd_quadratic_backward(T* dsc, T* dsb, T* dsx, T* ddt, T* ddA, T* dS_0, const T* dY, const T* dS_T, const T* sc,
                            const T* sb, const T* sx, const T* dt, const T* dA, const T* S_0, const SsdShape&);
// dchunk_states, (B,H,NC,P,N), the gradients of chunk_states, may be null too.
template <class T>
void ssd_chunked_backward(T* dsc, T* dsb, T* dsx, T* ddt, T* ddA, T* dS_0, T* dchunk_states, const T* dY, const T* dS_T,
                          const T* sc, const T* sb, const T* sx, const T* dt, const T* dA, const T* chunk_states,
                          const SsdShape&);

// out = w * x + dropout(m). site: which of the model's dropouts this is (2 layer + {0 mixer, 1 feed-forward}).
struct Dropout {
    double p = 0;  // 0: none, key is not read
    DropoutKey key{};
    uint32_t site = 0;
};
template <class T>
void residual_forward(T* out, const T* x, const T* m, const T* w, const Dropout&, int64 rows, int64 D);
template <class T>
void residual_backward(T* dx, T* dm, T* dw, const T* dout, const T* x, const T* w, const Dropout&, int64 rows, int64 D);
// h = silu(gate) * up, gate and up side by side in rows of 2F
template <class T>
void swiglu_forward(T* h, const T* gate_up, int64 rows, int64 F);
template <class T>
void swiglu_backward(T* dgate_up, const T* dh, const T* gate_up, int64 rows, int64 F);
// losses (rows) in nats; logits (rows,V). The backward replaces logits by scale * d(sum of losses)/d(logits).
template <class T>
void cross_entropy_forward(T* losses, const T* logits, const int32_t* targets, int64 rows, int64 V);
template <class T>
void cross_entropy_backward(T* logits, const T* losses, const int32_t* targets, double scale, int64 rows, int64 V);
template <class T>
void adamw_update(T* w, T* m, T* v, const T* g, const AdamW&, bool decay, double lr, int64 step, double grad_scale,
                  int64 n);

// Watches a model compute: sees each tensor, by its name in docs/oracle.md, as soon as it is there, and may change it, as an
// engine of less precision would by rounding. data: shape[0]*shape[1] rows, `ld` elements apart, of the other dimensions.
template <class T>
struct Probe {
    virtual ~Probe() = default;
    virtual void see(const std::string& name, T* data, const Shape& shape, int64 ld) = 0;
    // What the objective adds to the gradient of an SSD layer's final state, (B,H,P,N); null: nothing.
    virtual const T* final_state_cotangent(int64 layer) const = 0;
};

// What one layer's forward keeps for its backward, rows = B*T.
template <class T>
struct LayerActivations {
    std::vector<T> x;             // (rows,D) input
    std::vector<T> rstd1, u1;     // (rows), (rows,D) first norm
    std::vector<T> proj;          // (rows, ssd_width or attn_width): C|B|X|dt_raw or q|k|v, rotated in place
    std::vector<T> dt, dA;        // SSD: (rows,H)
    std::vector<T> chunk_states;  // SSD: (B,H,NC,P,N)
    std::vector<T> final_state;   // SSD: (B,H,P,N), for a probe
    std::vector<T> lse;           // attention: (rows,H)
    std::vector<T> y;             // (rows,D) heads' outputs
    std::vector<T> x_mid;         // (rows,D) after the first residual
    std::vector<T> rstd2, u2;     // second norm
    std::vector<T> gate_up, h;    // (rows,2F), (rows,F)
};

template <class T>
struct ModelState : State {
    struct Layer {
        std::vector<T> S;     // SSD: (B,H,P,N)
        std::vector<T> k, v;  // attention: (B,capacity,Hkv,P)
    };
    std::vector<Layer> layers;
    ModelState(const Config&, int64 B, int64 capacity);
};

// State files: every engine writes and reads its states through this one.
void save_state(const Config&, const ModelState<float>&, const std::string& path);
std::unique_ptr<ModelState<float>> load_state(const Config&, const std::string& path, int64 capacity);

// The whole model in precision T. Engine methods of the same names are thin wrappers of these, with T = float.
template <class T>
class Model {
  public:
    const Config config;
    const ParamTable table;
    std::vector<T> weights, gradients;            // flat, table.count each
    std::vector<LayerActivations<T>> layers;      // of the last forward
    std::vector<T> x_final, rstd_final, u_final;  // (rows,D), (rows), (rows,D)
    std::vector<T> logits, losses;                // (rows,V), (rows); backward turns logits into their gradient
    Probe<T>* probe = nullptr;

    explicit Model(const Config& c) : config(c), table(c), weights(size_t(table.count)), layers(size_t(c.L)) {}

    // See Engine::forward and Engine::step: with a state, the sequences go on from it and it is advanced. Without
    // targets only the logits are computed: of every token, or of each sequence's last, (B,V).
    double forward(const int32_t* tokens, const int32_t* targets, int64 B, int64 T_, const DropoutKey*,
                   ModelState<T>* state, bool every_token = true);
    void backward(double scale);
    std::string find_non_finite() const;

  private:
    RopeTable<T> rope_qk, rope_cb;
    std::vector<int32_t> tokens, targets;  // of the last forward
    int64 B = 0, T_ = 0;
    DropoutKey dropout_key{};
    bool dropout_on = false;
    struct Workspace {                      // not needed after the op that reads it
        std::vector<T> m;                   // (rows,D) mixer's or feed-forward's output
        std::vector<T> dx, dm, du, dy, dh;  // (rows,D), dh (rows,F)
        std::vector<T> dproj, dgate_up;     // as proj, gate_up
        std::vector<T> ddt, ddA;            // (rows,H)
        std::vector<T> last;                // (B,D) last token of each sequence
    } ws;

    const T* w(Param p, int64 layer = -1) const { return weights.data() + table.offset(p, layer); }
    T* g(Param p, int64 layer = -1) { return gradients.data() + table.offset(p, layer); }
    Dropout dropout(int64 layer, int half) const {
        return {dropout_on ? config.dropout : 0.0, dropout_key, uint32_t(2 * layer + half)};
    }
    void mixer_forward(int64 layer, ModelState<T>* state, int64 pos0);
    void mixer_backward(int64 layer);
    // Shows a tensor, or the gradient of the tensor called `name`, to the probe. layer -1: outside the layers; ld 0: rows lie
    // without gaps.
    void see(int64 layer, const char* name, T* data, std::initializer_list<int64> shape, int64 ld = 0) {
        if (probe) show("", layer, name, data, shape, ld);
    }
    void see_gradient(int64 layer, const char* name, T* data, std::initializer_list<int64> shape, int64 ld = 0) {
        if (probe) show("grad.", layer, name, data, shape, ld);
    }
    void show(const char* kind, int64 layer, const char* name, T* data, const Shape& shape, int64 ld);
    void see_chunks(int64 layer);
};

// The gradient check: every gradient of every op and of a small hybrid model against central differences in double.
struct GradientError {
    std::string op, tensor;
    double relative;  // L2 norm of the difference over L2 norm of the central difference
};
std::vector<GradientError> gradient_check();

}  // namespace ref

// ---------------------------------------------------------------------------------------------------------------------
// The layers on the GPU, for tests (transxssm.cu, section 14)
// ---------------------------------------------------------------------------------------------------------------------
// Twins of the above on host arrays: inputs are rounded to the precision's type of activations, the GPU's kernels
// run, and outputs come back as float. What lies in one buffer (q, k, v; sc, sb, sx; gradients likewise) is copied as
// one: pass the places inside that buffer.

namespace cuda {

using ref::AttentionShape;
using ref::Dropout;
using ref::SsdShape;

void linear_forward(Precision, float* y, const float* x, const float* w, int64 rows, int64 in, int64 out);
void linear_backward(Precision, float* dx, float* dw, const float* dy, const float* x, const float* w, int64 rows,
                     int64 in, int64 out);
void embedding_forward(Precision, float* x, const int32_t* tokens, const float* embed, int64 rows, int64 D, int64 V);
void embedding_backward(Precision, float* dembed, const float* dx, const int32_t* tokens, int64 rows, int64 D, int64 V);
// out = w_res * x + dropout(m), u = rmsnorm(out) * w_norm; m null: u = rmsnorm(x) * w_norm
void residual_norm_forward(Precision, float* out, float* u, float* rstd, const float* x, const float* m,
                           const float* w_res, const float* w_norm, double eps, const Dropout&, int64 rows, int64 D);
// dx = w_res * dout + (the norm's part, from du); dout null: without the first term. dw are added to.
void norm_residual_backward(Precision, float* dx, float* dw_norm, float* dw_res, const float* dout, const float* du,
                            const float* x, const float* w_res, const float* w_norm, const float* rstd, int64 rows,
                            int64 D);
void dropout_backward(Precision, float* dm, const float* dout, const Dropout&, int64 n);
void rope(Precision, float* x, const ref::RopeTable<float>&, int64 B, int64 T, int64 H, int64 ld, int64 pos0,
          bool inverse);
void attention_forward(Precision, float* y, float* lse, const float* q, const float* k, const float* v,
                       const AttentionShape&);
void attention_backward(Precision, float* dq, float* dk, float* dv, const float* dy, const float* q, const float* k,
                        const float* v, const float* y, const float* lse, const AttentionShape&);
void ssd_dt_forward(float* dt, float* dA, const float* dt_raw, const float* dt_bias, const float* A_log, bool decay,
                    int64 rows, int64 H, int64 ld);
void ssd_dt_backward(float* ddt_raw, float* ddt_bias, float* dA_log, const float* ddt, const float* ddA,
                     const float* dt_raw, const float* dt_bias, const float* A_log, const float* dA, bool decay,
                     int64 rows, int64 H, int64 ld);
// What each kernel of a decode step does beside its own work: it multiplies its input by rstd of x's row (B,D), and
// out = w_res * x.
struct ResidualTwin {
    float* out;
    const float *x, *w_res;
    double eps;
};
// One token at position `pos`, from rows C | B | X | dt_raw before RoPE and rstd; S is advanced in place.
void ssd_step(Precision, float* Y, float* S, const float* proj, const ResidualTwin&, const float* dt_bias,
              const float* A_log, const ref::RopeTable<float>&, int64 pos, bool decay, const SsdShape&);
// One token after `past` others, from rows q | k | v before RoPE and rstd; its k and v are appended to the caches. The
// keys are dealt out to `splits` blocks.
void attention_step(Precision, float* y, float* k_cache, float* v_cache, const float* proj, const ResidualTwin&,
                    const ref::RopeTable<float>&, int64 past, int64 splits, const AttentionShape&);
// h = swiglu(rstd gate_up)
void swiglu_step(Precision, float* h, const float* gate_up, const ResidualTwin&, int64 B, int64 F, int64 D);
// RoPE of C and B is part of these: angles of `table` (which has at least 65 positions) from position pos0 on; null: none.
void ssd_chunked_forward(Precision, float* Y, float* S_T, const float* sc, const float* sb, const float* sx,
                         const float* dt, const float* dA, const float* S_0, const ref::RopeTable<float>* table,
                         int64 pos0, const SsdShape&);
// dsc: the whole buffer of the gradients of sc, sb and sx, which lie in it as those do in theirs.
void ssd_chunked_backward(Precision, float* dsc, float* ddt, float* ddA, float* dS_0, const float* dY,
                          const float* dS_T, const float* sc, const float* sb, const float* sx, const float* dt,
                          const float* dA, const float* S_0, const ref::RopeTable<float>* table, int64 pos0,
                          const SsdShape&);
void swiglu_forward(Precision, float* h, const float* gate_up, int64 rows, int64 F);
void swiglu_backward(Precision, float* dgate_up, const float* dh, const float* gate_up, int64 rows, int64 F);
// gate_up = x W^T, h = swiglu(gate_up); and, from dy (rows,D), the gradient of h W_down^T: dgate_up, and h once more.
void gate_up_forward(Precision, float* h, float* gate_up, const float* x, const float* w, int64 rows, int64 D, int64 F);
void down_backward(Precision, float* dgate_up, float* h, const float* dy, const float* gate_up, const float* w_down,
                   int64 rows, int64 D, int64 F);
// logits, in rows a multiple of 8 apart, become the gradient of the sum of the losses.
void cross_entropy(Precision, float* losses, float* logits, const int32_t* targets, int64 rows, int64 V);

}  // namespace cuda
