// The forward on the CPU: token ids of sequences for many tasks in, probabilities out, in one call.
//
// The same network as `model_store/encoder.py`, which is its reference. Every row is computed in
// an order that depends on nothing but its own sequence and task, so that an answer never depends
// on who shares the batch. All tasks share a batch: the backbone's weights are packed once, a task's
// neurons are gathered from the one copy panel by panel where they are used (or kept packed, when
// the task is asked often: same layout, same answers), and low-rank deltas, norms, scales and heads of
// its own stay beside the backbone's.
//
// Letters: H hidden, E embedding width, A heads, d a head's width, K kept neurons, P prompt rows,
// N packed rows, R rows that heads read. Widths in memory are filled up with zeros: `Hp`, `Ep`, `Kp` and
// `AD` to multiples of 64, `dp` to a multiple of 32.

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <vector>

#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "product.h"
#include "team.h"

namespace taskbone {

// -- What Python hands over: `model_store/native.py` has the same structures -------------------------

extern "C" {

struct Norm {
    const float* weight;
    const float* bias;
};

// Outputs are filled up to a multiple of 64. `scales` and `sums` belong to int8 weights: a column's
// factor, and the sum of its integers.
struct Linear {
    const uint32_t* panels;
    const float* bias;
    const float* scales;
    const int32_t* sums;
};

struct LayerWeights {
    Linear qkv;             // outputs [3][AD], a head's rows dp apart
    Linear out;             // inputs [AD]
    const char* w_in;       // [F][Hp]
    const float* b_in;      // [F]
    const float* in_scales; // [F]
    const int32_t* in_sums; // [F]
    const char* w_out;      // [Hp / 64][F][64]
    const float* b_out;     // [Hp]
    const float* out_scales;  // [Hp]
    Norm attention_norm, ffn_norm;
    int32_t bytes;          // int8 weights, against what the precision is otherwise
};

struct Model {
    int32_t precision;      // 0 fp32, 1 bf16, 2 int8
    int32_t layers, hidden, heads, ffn, embedding, activation, position_offset;
    float eps;
    const void* words;      // [V][Ep], low precision
    const float* positions; // [positions][Ep]
    const float* types;     // [types][Ep], or null
    Norm embedding_norm;
    Linear projection;      // E -> H, or null
    const LayerWeights* layer;
};

// Beside a linear map: `up (down x)`; packed like weights, in low precision.
struct Delta {
    int64_t rank;
    const uint32_t* down;
    const uint32_t* up;
};

struct TaskLayer {
    int32_t kept;
    int32_t heads;               // of its own, or -1: all
    const uint16_t* neurons;     // [kept]
    const int32_t* head_list;    // [heads]
    const int32_t* out_sums;     // [Hp] of `out` over its heads
    const uint32_t* in_panels;   // packed neurons, or null: gathered where they are used
    const uint32_t* out_panels;
    const int32_t* outer_sums;   // [Hp] of packed `w_out`
    const float* scales;         // [Kp] of neurons, or null
    const float* b_out;          // [Hp] in place of the backbone's, or null
    Norm attention_norm, ffn_norm;  // or null
    Delta q, k, v, o, in, out;
};

struct Task {
    const TaskLayer* layers;
    int32_t own_attention;       // heads, deltas or norms of its own
    int32_t read;                // 0 first token, 1 mask, 2 mean of the text
    int32_t prompt;              // P
    int32_t classes;             // 0: no linear head
    const float* prompt_vectors; // [P][Ep]
    const float* prompt_hidden;  // [P][Hp] as it enters layer 0, or null: computed
    const void* prompt_qkv;      // [P][3 AD]
    const float* head_weight;    // [C][Hp]
    const float* head_bias;      // [C]
};

struct Batch {
    int32_t sequences, segments;
    const int32_t* tokens;       // of all sequences
    const int32_t* token_types;
    const int32_t* lengths;      // [sequences] text tokens
    const int32_t* masks;        // [sequences]
    const int32_t* segment_of;   // [sequences], ascending
    const Task* const* tasks;    // [segments]
    float* probabilities;        // of all sequences, each its task's classes
    float* read;                 // [sequences][H] what heads read, or null
};

}  // extern "C"

constexpr size_t HUGE_PAGE = 1 << 21;

// Bytes of a block's rows as they enter a layer. All of them go through the weights together: weights
// come from afar, and are read as seldom as rows stay in the second-level cache.
static int block_bytes() {
    static const long cache = sysconf(_SC_LEVEL2_CACHE_SIZE);
    return int(std::clamp(cache * 3 / 8, 1L << 18, 1L << 22));
}

template <class T>
struct Buffer {
    T* data = nullptr;
    size_t size = 0;
    ~Buffer() { std::free(data); }
    T* at_least(size_t wanted) {
        if (wanted > size) {
            std::free(data);
            size = wanted + wanted / 4;
            const size_t whole = (size * sizeof(T) + HUGE_PAGE - 1) / HUGE_PAGE * HUGE_PAGE;
            data = static_cast<T*>(std::aligned_alloc(HUGE_PAGE, whole));
            madvise(data, whole, MADV_HUGEPAGE);
            // Pages are touched now and not under the first request.
            std::memset(static_cast<void*>(data), 0, size * sizeof(T));
        }
        return data;
    }
};

// Some neighbouring rows of one segment, or of several that share what is computed (segment -1).
struct Block {
    int row, rows, segment;
};

struct Sequence {
    int text, texts, prompt, prompts;  // first row and number of rows
    int read, reads;                   // in the read rows
    int token, segment, answer;
};

// As many blocks as threads, or twice as many and so on, where there are rows enough: who ends a block
// finishes its rows alone.
static void split(std::vector<Block>& blocks, int row, int rows, int segment, int largest, int members) {
    int parts = (rows + largest - 1) / largest;
    if (rows >= 2 * ROWS * members) parts = up(parts, members);
    for (int part = 0; part < parts; ++part) {
        const int first = int(int64_t(rows) * part / parts), end = int(int64_t(rows) * (part + 1) / parts);
        blocks.push_back({row + first, end - first, segment});
    }
}

// Sizes that follow from a model.
struct Sizes {
    int Hp, Ep, d, dp, AD;
    explicit Sizes(const Model& model)
        : Hp(up(model.hidden, 64)), Ep(up(model.embedding, 64)), d(model.hidden / model.heads),
          dp(up(d, 32)), AD(up(model.heads * dp, 64)) {}
};

struct Space {
    Buffer<float> x, y, read_x, scales, zeros;
    Buffer<char> low, bytes, qkv, attended, inner, attended_bytes, inner_bytes, read_low, read_bytes, read_q;
    std::vector<Buffer<char>> own;  // of each thread
    explicit Space(int threads) : own(threads) {}
    std::vector<std::atomic<int>> done;
};

// Pack a group of neurons' rows of `w_in` from the backbone.
template <Type T>
static void pack_in(const LayerWeights& layer, int Hp, const uint16_t* neurons, int count, uint32_t* panels) {
    constexpr int per = Element<T>::per_unit;
    alignas(64) static const char nothing[16384] = {};
    const int units = Hp / per;
    const int64_t stride = 4 * int64_t(units);
    for (int p = 0; p < PANELS; ++p) {
        const char* rows[LANES];
        for (int i = 0; i < LANES; ++i) {
            const int n = p * LANES + i;
            rows[i] = n < count ? layer.w_in + neurons[n] * stride : nothing;
        }
        pack_rows(rows, units, panels + p * int64_t(units) * LANES);
    }
}

// Pack a group of outputs of `w_out` over the neurons; `sums` gets the columns' sums of int8 weights.
template <Type T>
static void pack_out(const LayerWeights& layer, int ffn, int group, const uint16_t* neurons, int kept,
                     uint32_t* panels, int32_t* sums) {
    typedef typename Element<T>::type E;
    constexpr int per = Element<T>::per_unit;
    alignas(64) static const char nothing[COLUMNS * 4] = {};
    const int units = up(kept, 64) / per;
    // In memory 64 outputs of a neuron stand together.
    const char* base = layer.w_out + (int64_t(group) * COLUMNS / 64 * ffn * 64 + group * COLUMNS % 64) * sizeof(E);
    for (int n = 0; n < units * per; n += 64) {
        const char* rows[64];
        for (int i = 0; i < 64; ++i)
            rows[i] = n + i < kept ? base + int64_t(neurons[n + i]) * 64 * sizeof(E) : nothing;
        uint32_t* to[PANELS];
        for (int p = 0; p < PANELS; ++p) to[p] = panels + (p * int64_t(units) + n / per) * LANES;
        pack_columns<T>(rows, 64 / per, PANELS, to);
    }
    if constexpr (T == Type::BYTE) {
        for (int c = 0; c < COLUMNS; ++c) sums[c] = 0;
        for (int n = 0; n < kept; ++n) {
            const int8_t* row = reinterpret_cast<const int8_t*>(base) + int64_t(neurons[n]) * 64;
            for (int c = 0; c < COLUMNS; ++c) sums[c] += row[c];
        }
    }
}

template <int PRECISION>
class Forward {
    static constexpr Type LOW = PRECISION == 0 ? Type::FLOAT : Type::BF16;
    static constexpr Type BYTES = PRECISION == 2 ? Type::BYTE : LOW;
    static constexpr int PER = Element<LOW>::per_unit;
    static constexpr bool ROUNDED = PRECISION != 0;
    typedef typename Element<LOW>::type Low;

    // Rows of activations: in float for the residual stream, in low precision, and in bytes with
    // `value = scale (byte - zero)`.
    struct Rows {
        float* x;
        Low* low;
        uint8_t* bytes;
        float* scales;
        float* zeros;
    };

  public:
    Forward(const Model& model, Team& team, Space& space, const Batch& batch)
        : model_(model), size_(model), team_(team), space_(space), batch_(batch) {
        arrange();
        allocate();
    }

    void run() {
        team_.run([this](int me) {
            open_tiles();
            embed(me);
            for (int number = 0; number < model_.layers; ++number) layer(me, number);
            answer(me);
            close_tiles();
        });
    }

    // What a prompt is at the entrance of layer 0; the batch is one sequence without text.
    void prompt(float* hidden, Low* qkv) {
        team_.run([this](int me) {
            open_tiles();
            embed(me);
            project(me, 0, in_, first_blocks_, 0, 3, qkv_, 3 * size_.AD);
            close_tiles();
        });
        std::memcpy(hidden, in_.x, sizeof(float) * rows_ * size_.Hp);
        std::memcpy(qkv, qkv_, sizeof(Low) * rows_ * 3 * size_.AD);
    }

  private:
    // -- Getting ready --------------------------------------------------------------------------------

    // Rows of a segment stand together: the texts of its sequences, then their prompts.
    void arrange() {
        int token = 0, answer = 0, sequence = 0, shared_row = 0, shared_read = 0;
        sequences_.resize(batch_.sequences);
        block_ = std::clamp(block_bytes() / (size_.Hp * (PRECISION == 2 ? 1 : int(sizeof(Low)))) / ROWS * ROWS, 64, 4096);
        auto share = [&](int until_row, int until_read) {
            split(blocks_, shared_row, until_row - shared_row, -1, block_, team_.size());
            split(read_blocks_, shared_read, until_read - shared_read, -1, block_, team_.size());
            shared_row = until_row, shared_read = until_read;
        };
        bool any_cached = false;
        int text_from = 0;
        auto project_texts = [&](int until) {
            split(text_blocks_, text_from, until - text_from, -1, block_, team_.size());
            text_from = until;
        };
        for (int segment = batch_.segment_of[0]; sequence < batch_.sequences; ++segment) {
            const Task& task = *batch_.tasks[segment];
            const int first = sequence, row = rows_, read = reads_;
            while (sequence < batch_.sequences && batch_.segment_of[sequence] == segment) {
                Sequence& one = sequences_[sequence];
                one = {rows_, batch_.lengths[sequence], 0, task.prompt, reads_, 1, token, segment, answer};
                if (task.read == 2) one.reads = one.texts;
                if (!one.texts) one.reads = 0;
                rows_ += one.texts, reads_ += one.reads, token += one.texts, answer += task.classes;
                ++sequence;
            }
            const int texts_end = rows_;
            for (int s = first; s < sequence; ++s) sequences_[s].prompt = rows_, rows_ += task.prompt;
            const bool cached = task.prompt && task.prompt_hidden;
            const int projected_end = cached ? texts_end : rows_;
            split(ffn_blocks_, row, rows_ - row, segment, block_, team_.size());
            split(read_ffn_blocks_, read, reads_ - read, segment, block_, team_.size());
            if (task.own_attention) {
                share(row, read);
                split(blocks_, row, rows_ - row, segment, block_, team_.size());
                split(read_blocks_, read, reads_ - read, segment, block_, team_.size());
                shared_row = rows_, shared_read = reads_;
                project_texts(row);
                split(text_blocks_, row, projected_end - row, segment, block_, team_.size());
                text_from = rows_;
            } else if (cached) {
                project_texts(texts_end);
                text_from = rows_;
            }
            any_cached |= cached;
            for (int number = 0; number < model_.layers; ++number) {
                const TaskLayer& own = task.layers[number];
                widest_ = std::max(widest_, up(own.kept, 64));
                for (const Delta* delta : {&own.q, &own.k, &own.v, &own.o, &own.in, &own.out})
                    rank_ = std::max(rank_, up(int(delta->rank), LANES));
            }
        }
        share(rows_, reads_);
        project_texts(rows_);
        first_blocks_ = any_cached ? text_blocks_ : blocks_;
        for (const Sequence& one : sequences_) longest_ = std::max(longest_, one.texts + one.prompts);
        widest_ = std::max(widest_, 64);
    }

    void allocate() {
        // Products read whole tiles of rows, and what is beyond the last is not looked at.
        const int64_t n = rows_ + ROWS, r = reads_ + ROWS, Hp = size_.Hp, AD = size_.AD;
        constexpr bool bytes = PRECISION == 2;
        in_ = {space_.x.at_least(n * Hp), low(space_.low, n * Hp), nullptr, nullptr, nullptr};
        read_ = {space_.read_x.at_least(r * Hp), low(space_.read_low, r * Hp), nullptr, nullptr, nullptr};
        attended_ = {nullptr, low(space_.attended, n * AD), nullptr, nullptr, nullptr};
        inner_ = {nullptr, low(space_.inner, n * widest_), nullptr, nullptr, nullptr};
        y_ = space_.y.at_least(n * std::max(Hp, int64_t(size_.Ep)));
        qkv_ = low(space_.qkv, n * 3 * AD);
        read_q_ = low(space_.read_q, r * AD);
        if (bytes) {
            float* scales = space_.scales.at_least(4 * n);
            float* zeros = space_.zeros.at_least(4 * n);
            Rows* all[4] = {&in_, &read_, &attended_, &inner_};
            Buffer<char>* kept[4] = {
                &space_.bytes, &space_.read_bytes, &space_.attended_bytes, &space_.inner_bytes};
            const int64_t sizes[4] = {n * Hp, r * Hp, n * AD, n * widest_};
            for (int i = 0; i < 4; ++i) {
                all[i]->bytes = reinterpret_cast<uint8_t*>(kept[i]->at_least(sizes[i]));
                all[i]->scales = scales + i * n, all[i]->zeros = zeros + i * n;
            }
        }
        for (int member = 0; member < team_.size(); ++member) {
            Buffer<char>& own = space_.own[member];
            own.at_least(lay_out(nullptr).end - static_cast<char*>(nullptr));
            own_.push_back(lay_out(own.data));
        }
        const size_t counters = 1 + std::max({blocks_.size(), ffn_blocks_.size(), read_blocks_.size(),
                                              read_ffn_blocks_.size(), first_blocks_.size(), sequences_.size()});
        if (space_.done.size() < counters) space_.done = std::vector<std::atomic<int>>(2 * counters);
    }

    // What a thread needs for itself.
    struct Scratch {
        float* scores;        // [keys / 64][ROWS][64]
        uint32_t* panels;     // gathered
        const char** rows;    // [keys]
        uint32_t* keys;       // packed
        uint32_t* values;
        Low* weights;         // [ROWS][keys]
        Low* side;            // [3][block][rank]
        char* end;
    };

    Scratch lay_out(char* from) const {
        const int64_t keys = up(longest_, 64);
        Scratch scratch;
        auto take = [&]<class T>(T*& part, int64_t count) {
            part = reinterpret_cast<T*>(from);
            from += (count * int64_t(sizeof(T)) + 63) / 64 * 64;
        };
        take(scratch.scores, ROWS * keys);
        take(scratch.panels, int64_t(COLUMNS) * std::max(size_.Hp, widest_));
        take(scratch.rows, keys);
        take(scratch.keys, keys * size_.dp);
        take(scratch.values, keys * size_.dp);
        take(scratch.weights, ROWS * keys);
        take(scratch.side, 3 * int64_t(block_) * rank_);
        scratch.end = from;
        return scratch;
    }

    Scratch& scratch(int me) { return own_[me]; }

    Low* low(Buffer<char>& buffer, int64_t count) {
        return reinterpret_cast<Low*>(buffer.at_least(sizeof(Low) * size_t(count)));
    }

    // -- Phases ------------------------------------------------------------------------------------------

    void embed(int me) {
        const bool projected = model_.projection.panels;
        const int Ep = size_.Ep, E = model_.embedding;
        team_.each(me, batch_.sequences, [&](int number) {
            const Sequence& one = sequences_[number];
            const Task& task = *batch_.tasks[one.segment];
            auto finish = [&](int row, auto word, int position, int type) {
                float* to = projected ? y_ + int64_t(row) * Ep : in_.x + int64_t(row) * Ep;
                const float* at = model_.positions + int64_t(position + model_.position_offset) * Ep;
                const float* kind = model_.types ? model_.types + int64_t(type) * Ep : nullptr;
                for (int i = 0; i < Ep; i += LANES) {
                    floats x = load(word + i) + load(at + i);
                    if (kind) x += load(kind + i);
                    store(to + i, x);
                }
                normalise(to, E, Ep, model_.embedding_norm);
                if (!projected) round(in_, row, to, Ep, model_.layer[0].bytes);
            };
            const Low* words = static_cast<const Low*>(model_.words);
            for (int i = 0; i < one.texts; ++i) {
                const int token = one.token + i;
                finish(one.text + i, words + int64_t(batch_.tokens[token]) * Ep, i ? i + one.prompts : 0,
                       batch_.token_types[token]);
            }
            for (int i = 0; i < one.prompts; ++i) {
                const int64_t row = one.prompt + i;
                if (task.prompt_hidden) {
                    std::memcpy(in_.x + row * size_.Hp, task.prompt_hidden + int64_t(i) * size_.Hp, 4 * size_.Hp);
                    std::memcpy(qkv_ + row * 3 * size_.AD,
                                static_cast<const Low*>(task.prompt_qkv) + int64_t(i) * 3 * size_.AD,
                                sizeof(Low) * 3 * size_.AD);
                } else {
                    finish(int(row), task.prompt_vectors + int64_t(i) * Ep, 1 + i, 0);
                }
            }
        });
        if (!projected) return;
        // ELECTRA's small models: E -> H; the products' rows are rounded on their way.
        const int units = Ep / PER;
        team_.each(me, int(first_blocks_.size()), [&](int number) {
            const Block& block = first_blocks_[number];
            std::vector<Low> rounded(int64_t(block.rows + ROWS) * Ep);
            for (int64_t i = 0; i < int64_t(block.rows) * Ep; i += LANES)
                store(rounded.data() + i, load(y_ + int64_t(block.row) * Ep + i));
            alignas(64) float c[ROWS * COLUMNS];
            for (int group = 0; group < size_.Hp / COLUMNS; ++group) {
                const uint32_t* panels[PANELS];
                for (int p = 0; p < PANELS; ++p)
                    panels[p] = model_.projection.panels + (group * PANELS + p) * int64_t(units) * LANES;
                for (int r = 0; r < block.rows; r += ROWS) {
                    const int m = std::min(ROWS, block.rows - r);
                    product<LOW>(reinterpret_cast<const char*>(rounded.data() + int64_t(r) * Ep),
                                 sizeof(Low) * Ep, m, panels, PANELS, units, c);
                    for (int i = 0; i < m; ++i)
                        for (int j = 0; j < COLUMNS; j += LANES)
                            store(in_.x + int64_t(block.row + r + i) * size_.Hp + group * COLUMNS + j,
                                  load(c + i * COLUMNS + j) + load(model_.projection.bias + group * COLUMNS + j));
                }
            }
            for (int64_t r = block.row; r < block.row + block.rows; ++r)
                round(in_, r, in_.x + r * size_.Hp, size_.Hp, model_.layer[0].bytes);
        });
    }

    void layer(int me, int number) {
        const LayerWeights& weights = model_.layer[number];
        const bool last = number == model_.layers - 1;
        const int AD = size_.AD, Hp = size_.Hp;
        const std::vector<Block>& projected = number ? blocks_ : first_blocks_;
        const std::vector<Block>& blocks = last ? read_blocks_ : blocks_;
        const std::vector<Block>& ffn_blocks = last ? read_ffn_blocks_ : ffn_blocks_;
        Rows& rows = last ? read_ : in_;
        if (last) {
            // Only rows that a head reads go on: queries, output projection and FFN for them alone.
            gather_reads(me);
            project(me, number, in_, projected, 1, 3, qkv_, 3 * AD);
            project(me, number, read_, blocks, 0, 1, read_q_, AD);
        } else {
            project(me, number, in_, projected, 0, 3, qkv_, 3 * AD);
        }
        attend(me, number, last);

        each_chunk(me, blocks, Hp / COLUMNS, [&](const Block& block, int from, int to) {
            attention_out(me, number, rows, block, from, to);
        }, [&](const Block& block) {
            const TaskLayer* own = own_of(block, number);
            normalise(block, rows, own && own->attention_norm.weight ? own->attention_norm : weights.attention_norm,
                     weights.bytes);
        });

        each_chunk(me, ffn_blocks, widest_ / COLUMNS, [&](const Block& block, int from, int to) {
            ffn_in(me, number, rows, block, from, to);
        }, [&](const Block& block) {
            if (!weights.bytes) return;
            const int width = up(own_of(block, number)->kept, 64);
            for (int r = block.row; r < block.row + block.rows; ++r)
                quantise(inner_, r, inner_.low + int64_t(r) * widest_, width, widest_);
        });

        each_chunk(me, ffn_blocks, Hp / COLUMNS, [&](const Block& block, int from, int to) {
            ffn_out(me, number, rows, block, from, to);
        }, [&](const Block& block) {
            const TaskLayer* own = own_of(block, number);
            const bool bytes = number + 1 < model_.layers && model_.layer[number + 1].bytes;
            normalise(block, rows, own->ffn_norm.weight ? own->ffn_norm : weights.ffn_norm, bytes);
        });
    }

    // -- A linear map over a block of rows ---------------------------------------------------------------

    // Rows of a delta's inner product with `x`, ready to be multiplied with `up`.
    struct Side {
        const Low* rows = nullptr;
        int64_t stride = 0;
        int units = 0;
        const uint32_t* up = nullptr;
    };

    Side side_of(const Delta& delta, const Low* x, int64_t ldx, int rows, int width, Low* scratch) {
        if (!delta.rank) return {};
        const int rank = up(int(delta.rank), LANES), units = width / PER;
        alignas(64) float c[ROWS * COLUMNS];
        for (int r = 0; r < rows; r += ROWS) {
            const int m = std::min(ROWS, rows - r);
            for (int p = 0; p < rank / LANES; ++p) {
                const uint32_t* panel = delta.down + p * int64_t(units) * LANES;
                by_vectors<LOW>(reinterpret_cast<const char*>(x + r * ldx), sizeof(Low) * ldx, m, &panel, 1,
                                units, c, false);
                for (int i = 0; i < m; ++i)
                    store(scratch + int64_t(r + i) * rank + p * LANES, load(c + i * COLUMNS));
            }
        }
        return {scratch, rank, (int(delta.rank) + PER - 1) / PER, delta.up};
    }

    // One group of outputs for all rows of a block: `out(row, j, x)` gets the 16 outputs from j on.
    // `columns` is the first output as `scales`, `sums` and `side.up` count it.
    template <class Out>
    void group(const Rows& in, int64_t width, const Block& block, bool bytes, const uint32_t* const* panels,
               int count, int units, const float* scales, const int32_t* sums, const Side& side, int columns,
               Out out) {
        alignas(64) float c[ROWS * COLUMNS];
        const char* a = bytes ? reinterpret_cast<const char*>(in.bytes) : reinterpret_cast<const char*>(in.low);
        const int64_t lda = width * (bytes ? 1 : int64_t(sizeof(Low)));
        for (int r = 0; r < block.rows; r += ROWS) {
            const int m = std::min(ROWS, block.rows - r);
            const int64_t row = block.row + r;
            if (bytes) {
                product<BYTES>(a + row * lda, lda, m, panels, count, units, c);
                if (!side.rows) {
                    dequantise(c, m, count, in.scales + row, in.zeros + row, scales, sums,
                               [&](int i, int j, floats x) { out(row + i, j, x); });
                    continue;
                }
                dequantise(c, m, count, in.scales + row, in.zeros + row, scales, sums,
                           [&](int i, int j, floats x) { store(c + i * COLUMNS + j, x); });
            } else {
                product<LOW>(a + row * lda, lda, m, panels, count, units, c);
            }
            beside(side, r, m, columns, count, c);
            for (int i = 0; i < m; ++i)
                for (int j = 0; j < count * LANES; j += LANES) out(row + i, j, load(c + i * COLUMNS + j));
        }
    }

    static void beside(const Side& side, int r, int m, int columns, int count, float* c) {
        if (!side.rows) return;
        const uint32_t* panels[PANELS];
        for (int p = 0; p < count; ++p)
            panels[p] = side.up + (columns / LANES + p) * int64_t(side.units) * LANES;
        by_vectors<LOW>(reinterpret_cast<const char*>(side.rows + r * side.stride), sizeof(Low) * side.stride, m,
                        panels, count, side.units, c, true);
    }

    // Integers to what they stand for: `scale (total - zero sum) column_scale`.
    template <class Out>
    static void dequantise(const float* c, int m, int count, const float* scales, const float* zeros,
                           const float* column_scales, const int32_t* sums, Out out) {
        floats factors[PANELS], offsets[PANELS];
        for (int p = 0; p < count; ++p) {
            ints column;
            std::memcpy(&column, sums + p * LANES, sizeof column);
            factors[p] = load(column_scales + p * LANES);
            offsets[p] = __builtin_convertvector(column, floats) * factors[p];
        }
        for (int i = 0; i < m; ++i)
            for (int p = 0; p < count; ++p) {
                ints total;
                std::memcpy(&total, c + i * COLUMNS + p * LANES, sizeof total);
                const floats x = __builtin_convertvector(total, floats) * factors[p] - zeros[i] * offsets[p];
                out(i, p * LANES, scales[i] * x);
            }
    }

    // Pieces of work: blocks by column chunks; who ends a block's last chunk finishes its rows.
    template <class Work, class Finish>
    void each_chunk(int me, const std::vector<Block>& blocks, int groups, Work work, Finish finish) {
        const int count = int(blocks.size()), wanted = 4 * team_.size();
        const int chunks = team_.size() == 1 ? 1 : std::min(groups, std::max(1, (wanted + count - 1) / count));
        team_.each(me, count * chunks, [&](int piece) {
            const int number = piece / chunks, chunk = piece % chunks;
            work(blocks[number], groups * chunk / chunks, groups * (chunk + 1) / chunks);
            if (chunks > 1) {
                std::atomic<int>& done = space_.done[number];
                if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) return;
                done.store(0, std::memory_order_relaxed);
            }
            finish(blocks[number]);
        });
    }

    const TaskLayer* own_of(const Block& block, int number) const {
        return block.segment < 0 ? nullptr : &batch_.tasks[block.segment]->layers[number];
    }

    // Queries, keys and values (parts 0, 1, 2) of rows: `[n][3][AD]`, or queries alone `[n][AD]`.
    void project(int me, int number, const Rows& in, const std::vector<Block>& blocks, int part_from,
                 int part_to, Low* to, int64_t ld) {
        const LayerWeights& weights = model_.layer[number];
        const int per_part = size_.AD / COLUMNS, Hp = size_.Hp;
        const int units = Hp / (weights.bytes ? 4 : PER);
        each_chunk(me, blocks, (part_to - part_from) * per_part, [&](const Block& block, int from, int end) {
            const TaskLayer* own = own_of(block, number);
            Side sides[3];
            int sided = -1;
            for (int g = from; g < end; ++g) {
                const int part = part_from + g / per_part, column = g % per_part * COLUMNS;
                const int heads = own && own->heads >= 0 ? own->heads : model_.heads;
                const int count = own && own->heads >= 0
                                      ? std::clamp((heads * size_.dp - column) / LANES, 0, PANELS) : PANELS;
                if (!count) continue;
                if (own && part != sided) {
                    const Delta* deltas[3] = {&own->q, &own->k, &own->v};
                    sided = part;
                    sides[part] = side_of(*deltas[part], in.low + int64_t(block.row) * Hp, Hp, block.rows, Hp,
                                          scratch(me).side + int64_t(part) * block_ * rank_);
                }
                // Where the task keeps only some heads, their panels stand apart in the backbone's.
                const uint32_t* panels[PANELS];
                alignas(64) float bias[COLUMNS], scales[COLUMNS];
                alignas(64) int32_t sums[COLUMNS];
                for (int p = 0; p < count; ++p) {
                    int at = column + p * LANES;
                    if (own && own->heads >= 0)
                        at = own->head_list[at / size_.dp] * size_.dp + at % size_.dp;
                    at += part * size_.AD;
                    panels[p] = weights.qkv.panels + at / LANES * int64_t(units) * LANES;
                    std::memcpy(bias + p * LANES, weights.qkv.bias + at, 64);
                    if (weights.bytes) {
                        std::memcpy(scales + p * LANES, weights.qkv.scales + at, 64);
                        std::memcpy(sums + p * LANES, weights.qkv.sums + at, 64);
                    }
                }
                const int64_t place = (ld == size_.AD ? 0 : part * size_.AD) + column;
                group(in, Hp, block, weights.bytes, panels, count, units, scales, sums,
                      own ? sides[part] : Side{}, column, [&](int64_t row, int j, floats x) {
                          store(to + row * ld + place + j, x + load(bias + j));
                      });
            }
        }, [](const Block&) {});
    }

    void attention_out(int me, int number, const Rows& rows, const Block& block, int from, int to) {
        const LayerWeights& weights = model_.layer[number];
        const TaskLayer* own = own_of(block, number);
        const bool some = own && own->heads >= 0;
        const int per = weights.bytes ? 4 : PER, AD = size_.AD, Hp = size_.Hp;
        const int units = AD / per, head_units = size_.dp / per;
        const int64_t size = weights.bytes ? 1 : sizeof(Low);
        Side side;
        if (own) {
            const int width = up((some ? own->heads : model_.heads) * size_.dp, LANES);
            side = side_of(own->o, attended_.low + int64_t(block.row) * AD, AD, block.rows, width,
                           scratch(me).side);
        }
        for (int g = from; g < to; ++g) {
            const int column = g * COLUMNS;
            const uint32_t* panels[PANELS];
            for (int p = 0; p < PANELS; ++p)
                panels[p] = weights.out.panels + (g * PANELS + p) * int64_t(units) * LANES;
            auto out = [&](int64_t row, int j, floats x) {
                float* to = rows.x + row * Hp + column + j;
                store(to, load(to) + (x + load(weights.out.bias + column + j)));
            };
            if (!some) {
                group(attended_, AD, block, weights.bytes, panels, PANELS, units,
                      weights.bytes ? weights.out.scales + column : nullptr,
                      weights.bytes ? weights.out.sums + column : nullptr, side, column, out);
                continue;
            }
            // Heads that are kept, one after the other: their inputs stand together in the rows.
            alignas(64) float c[ROWS * COLUMNS];
            for (int r = 0; r < block.rows; r += ROWS) {
                const int m = std::min(ROWS, block.rows - r);
                const int64_t row = block.row + r;
                std::memset(c, 0, sizeof c);
                for (int h = 0; h < own->heads; ++h) {
                    const uint32_t* at[PANELS];
                    for (int p = 0; p < PANELS; ++p)
                        at[p] = panels[p] + own->head_list[h] * int64_t(head_units) * LANES;
                    const char* a = weights.bytes
                                        ? reinterpret_cast<const char*>(attended_.bytes + row * AD)
                                        : reinterpret_cast<const char*>(attended_.low + row * AD);
                    a += h * size_.dp * size;
                    if (weights.bytes) product<BYTES>(a, AD, m, at, PANELS, head_units, c, true);
                    else product<LOW>(a, size * AD, m, at, PANELS, head_units, c, true);
                }
                if (weights.bytes)
                    dequantise(c, m, PANELS, attended_.scales + row, attended_.zeros + row,
                               weights.out.scales + column, own->out_sums + column,
                               [&](int i, int j, floats x) { store(c + i * COLUMNS + j, x); });
                beside(side, r, m, column, PANELS, c);
                for (int i = 0; i < m; ++i)
                    for (int j = 0; j < COLUMNS; j += LANES) out(row + i, j, load(c + i * COLUMNS + j));
            }
        }
    }

    void ffn_in(int me, int number, const Rows& in, const Block& block, int from, int to) {
        const LayerWeights& weights = model_.layer[number];
        const TaskLayer& own = *own_of(block, number);
        const int Hp = size_.Hp, units = Hp / (weights.bytes ? 4 : PER);
        const Side side = side_of(own.in, in.low + int64_t(block.row) * Hp, Hp, block.rows, Hp, scratch(me).side);
        to = std::min(to, up(own.kept, 64) / COLUMNS);
        const int32_t activation = model_.activation;
        for (int g = from; g < to; ++g) {
            const int column = g * COLUMNS, count = std::min(COLUMNS, own.kept - column);
            alignas(64) float bias[COLUMNS] = {}, scales[COLUMNS] = {};
            alignas(64) int32_t sums[COLUMNS] = {};
            for (int i = 0; i < count; ++i) {
                const int neuron = own.neurons[column + i];
                bias[i] = weights.b_in[neuron];
                if (weights.bytes) scales[i] = weights.in_scales[neuron], sums[i] = weights.in_sums[neuron];
            }
            const uint32_t* source = own.in_panels ? own.in_panels + g * int64_t(COLUMNS) * units : nullptr;
            if (!source) {
                uint32_t* gathered = scratch(me).panels;
                if (PRECISION == 2 && weights.bytes)
                    pack_in<Type::BYTE>(weights, Hp, own.neurons + column, count, gathered);
                else
                    pack_in<LOW>(weights, Hp, own.neurons + column, count, gathered);
                source = gathered;
            }
            const uint32_t* panels[PANELS];
            for (int p = 0; p < PANELS; ++p) panels[p] = source + p * int64_t(units) * LANES;
            group(in, Hp, block, weights.bytes, panels, PANELS, units, scales, sums, side, column,
                  [&](int64_t row, int j, floats x) {
                      x = activate<ROUNDED>(x + load(bias + j), activation);
                      if (own.scales) x *= load(own.scales + column + j);
                      store(inner_.low + row * widest_ + column + j, x);
                  });
        }
    }

    void ffn_out(int me, int number, const Rows& rows, const Block& block, int from, int to) {
        const LayerWeights& weights = model_.layer[number];
        const TaskLayer& own = *own_of(block, number);
        const int Hp = size_.Hp, width = up(own.kept, 64), units = width / (weights.bytes ? 4 : PER);
        const Side side = side_of(own.out, inner_.low + int64_t(block.row) * widest_, widest_, block.rows, width,
                                  scratch(me).side);
        const float* bias = own.b_out ? own.b_out : weights.b_out;
        for (int g = from; g < to; ++g) {
            const int column = g * COLUMNS;
            alignas(64) int32_t gathered_sums[COLUMNS];
            const int32_t* sums = own.outer_sums ? own.outer_sums + column : gathered_sums;
            const uint32_t* source = own.out_panels ? own.out_panels + g * int64_t(COLUMNS) * units : nullptr;
            if (!source) {
                uint32_t* gathered = scratch(me).panels;
                if (PRECISION == 2 && weights.bytes)
                    pack_out<Type::BYTE>(weights, model_.ffn, g, own.neurons, own.kept, gathered, gathered_sums);
                else
                    pack_out<LOW>(weights, model_.ffn, g, own.neurons, own.kept, gathered, gathered_sums);
                source = gathered;
            }
            const uint32_t* panels[PANELS];
            for (int p = 0; p < PANELS; ++p) panels[p] = source + p * int64_t(units) * LANES;
            group(inner_, widest_, block, weights.bytes, panels, PANELS, units,
                  weights.bytes ? weights.out_scales + column : nullptr, sums, side, column,
                  [&](int64_t row, int j, floats x) {
                      float* to = rows.x + row * Hp + column + j;
                      store(to, load(to) + (x + load(bias + column + j)));
                  });
        }
    }

    // -- Attention ---------------------------------------------------------------------------------------

    void attend(int me, int number, bool last) {
        const int count = batch_.sequences;
        const int chunks = team_.size() == 1
                               ? 1 : std::clamp((4 * team_.size() + count - 1) / count, 1, model_.heads);
        team_.each(me, count * chunks, [&](int piece) {
            const int which = piece / chunks, chunk = piece % chunks;
            const Sequence& one = sequences_[which];
            const Task& task = *batch_.tasks[one.segment];
            const int own = task.layers[number].heads;
            const int heads = own >= 0 ? own : model_.heads;
            for (int h = heads * chunk / chunks; h < heads * (chunk + 1) / chunks; ++h) {
                if (last) attend_head(me, one, h, read_q_, size_.AD, one.read, one.reads, 0, 0);
                else attend_head(me, one, h, qkv_, 3 * size_.AD, one.text, one.texts, one.prompt, one.prompts);
            }
            if (chunks > 1) {
                std::atomic<int>& done = space_.done[which];
                if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < chunks) return;
                done.store(0, std::memory_order_relaxed);
            }
            const bool bytes = model_.layer[number].bytes;
            auto finish = [&](int row, int rows) {
                for (int r = row; r < row + rows; ++r) {
                    Low* to = attended_.low + int64_t(r) * size_.AD;
                    const int width = heads * size_.dp;
                    std::fill(to + width, to + size_.AD, Low(0));
                    if (bytes) quantise(attended_, r, to, size_.AD, size_.AD);
                }
            };
            if (last) finish(one.read, one.reads);
            else finish(one.text, one.texts), finish(one.prompt, one.prompts);
        });
    }

    // One head of one sequence: the queries are rows [first, first + firsts) and [second, ...).
    void attend_head(int me, const Sequence& one, int head, const Low* q, int64_t ldq, int first, int firsts,
                     int second, int seconds) {
        alignas(64) static const char nothing[1024] = {};
        const int dp = size_.dp, AD = size_.AD, n = one.texts + one.prompts, n16 = up(n, LANES);
        const int64_t ld = 3 * AD;
        const int units = dp / PER;
        // Keys as inputs of the second product: whole units, and whole tiles where tiles will be used.
        const int keys = up(n, std::max(LANES, WHOLE_UNITS * PER));
        const int key_units = keys / PER;
        Scratch& own = scratch(me);
        Low* weights = own.weights;
        float* scores = own.scores;
        const char** rows = own.rows;
        const Low* k = qkv_ + AD + head * dp;
        for (int i = 0; i < n; ++i) {
            const int64_t row = i < one.texts ? one.text + i : one.prompt + i - one.texts;
            rows[i] = reinterpret_cast<const char*>(k + row * ld);
        }
        for (int i = n; i < keys; ++i) rows[i] = nothing;
        const int64_t panel = int64_t(units) * LANES;
        uint32_t* key_panels = own.keys;
        for (int p = 0; p < n16 / LANES; ++p) pack_rows(rows + p * LANES, units, key_panels + p * panel);
        for (int i = 0; i < n; ++i) rows[i] += sizeof(Low) * AD;
        uint32_t* value_panels[8];
        for (int p = 0; p < dp / LANES; ++p)
            value_panels[p] = own.values + p * int64_t(key_units) * LANES;
        pack_columns<LOW>(rows, key_units, dp / LANES, value_panels);

        const float scale = 1.0f / std::sqrt(float(size_.d));
        for (int range = 0; range < 2; ++range) {
            const int from = range ? second : first, total = range ? seconds : firsts;
            for (int r = 0; r < total; r += ROWS) {
                const int m = std::min(ROWS, total - r);
                const int64_t row = from + r;
                const char* queries = reinterpret_cast<const char*>(q + row * ldq + head * dp);
                for (int p = 0; p < n16 / LANES; p += PANELS) {
                    const uint32_t* panels[PANELS];
                    const int count = std::min(PANELS, n16 / LANES - p);
                    for (int i = 0; i < count; ++i) panels[i] = key_panels + (p + i) * panel;
                    product<LOW>(queries, sizeof(Low) * ldq, m, panels, count, units,
                                 scores + p * LANES * ROWS);
                }
                float factors[ROWS];
                for (int i = 0; i < m; ++i)
                    factors[i] = softmax(scores + i * COLUMNS, n, keys, scale, weights + int64_t(i) * keys);
                alignas(64) float c[ROWS * COLUMNS];
                for (int p = 0; p < dp / LANES; p += PANELS) {
                    const int count = std::min(PANELS, dp / LANES - p);
                    product<LOW>(reinterpret_cast<const char*>(weights), sizeof(Low) * keys, m,
                                 value_panels + p, count, key_units, c);
                    for (int i = 0; i < m; ++i)
                        for (int j = 0; j < count * LANES; j += LANES)
                            store(attended_.low + (row + i) * AD + head * dp + p * LANES + j,
                                  load(c + i * COLUMNS + j) * factors[i]);
                }
            }
        }
    }

    // `to[keys] = e^(scale (s - max s))`, zero from n on; gives one over their sum. Scores stand in
    // blocks of `[ROWS][COLUMNS]`.
    static float softmax(const float* s, int n, int keys, float scale, Low* to) {
        static const ints lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        auto at = [&](int j) { return s + j / COLUMNS * (ROWS * COLUMNS) + j % COLUMNS; };
        floats most = all(-3.0e38f);
        for (int j = 0; j < n; j += LANES) {
            const floats x = lanes < n - j ? load(at(j)) : all(-3.0e38f);
            most = larger(most, x);
        }
        const float top = maximum(most) * scale;
        floats total = {};
        for (int j = 0; j < keys; j += LANES) {
            floats p = {};
            if (j < n) {
                p = exp(load(at(j)) * scale - top);
                p = lanes < n - j ? p : floats{};
            }
            total += p;
            store(to + j, p);
        }
        return 1.0f / sum(total);
    }

    // -- Rows --------------------------------------------------------------------------------------------

    // LayerNorm of `x` in place; what fills a row up is zero before and after.
    void normalise(float* x, int width, int padded, const Norm& norm) const {
        floats total = {};
        for (int i = 0; i < padded; i += LANES) total += load(x + i);
        const float mean = sum(total) / width;
        floats squares = {};
        for (int i = 0; i < padded; i += LANES) {
            const floats off = load(x + i) - mean;
            squares += off * off;
        }
        const float spread = sum(squares) - (padded - width) * mean * mean;
        const float factor = 1.0f / std::sqrt(std::max(spread, 0.0f) / width + model_.eps);
        for (int i = 0; i < padded; i += LANES)
            store(x + i, (load(x + i) - mean) * factor * load(norm.weight + i) + load(norm.bias + i));
    }

    // A row in all forms that the next product wants.
    void round(Rows& rows, int64_t row, const float* x, int width, bool bytes) const {
        Low* low = rows.low + row * width;
        // Bytes are all that products of int8 want, but deltas are not quantized.
        if (!bytes || rank_)
            for (int i = 0; i < width; i += LANES) store(low + i, load(x + i));
        if (bytes) quantise(rows, row, x, width, width);
    }

    void normalise(const Block& block, Rows& rows, const Norm& norm, bool bytes) {
        const int Hp = size_.Hp;
        for (int64_t r = block.row; r < block.row + block.rows; ++r) {
            float* x = rows.x + r * Hp;
            normalise(x, model_.hidden, Hp, norm);
            round(rows, r, x, Hp, bytes);
        }
    }

    // A row's range, zero included, onto 0 to 255.
    template <class Source>
    void quantise(Rows& rows, int64_t row, const Source* x, int width, int64_t stride) const {
        if constexpr (PRECISION == 2) {
            floats low = {}, high = {}, lost = {};
            for (int i = 0; i < width; i += LANES) {
                const floats v = load(x + i);
                low = smaller(low, v), high = larger(high, v);
                lost += v * 0.0f;
            }
            const float bottom = -maximum(-low), top = maximum(high);
            // A byte cannot say that it is no number: the row's factor does.
            const float scale = std::max(top - bottom, 1e-30f) / 255.0f + sum(lost), inverse = 1.0f / scale;
            const float zero = std::nearbyint(-bottom * inverse);
            rows.scales[row] = scale, rows.zeros[row] = zero;
            uint8_t* to = rows.bytes + row * stride;
            for (int i = 0; i < width; i += LANES) store(to + i, load(x + i) * inverse + zero);
        }
    }

    void gather_reads(int me) {
        const int Hp = size_.Hp;
        team_.each(me, batch_.sequences, [&](int number) {
            const Sequence& one = sequences_[number];
            const Task& task = *batch_.tasks[one.segment];
            for (int i = 0; i < one.reads; ++i) {
                const int64_t from = one.text + (task.read == 1 ? batch_.masks[number] : i), to = one.read + i;
                std::memcpy(read_.x + to * Hp, in_.x + from * Hp, 4 * Hp);
                std::memcpy(read_.low + to * Hp, in_.low + from * Hp, sizeof(Low) * Hp);
                if (PRECISION == 2) {
                    std::memcpy(read_.bytes + to * Hp, in_.bytes + from * Hp, Hp);
                    read_.scales[to] = in_.scales[from], read_.zeros[to] = in_.zeros[from];
                }
            }
        });
    }

    // What heads read, and probabilities of linear heads.
    void answer(int me) {
        const int Hp = size_.Hp;
        team_.each(me, batch_.sequences, [&](int number) {
            const Sequence& one = sequences_[number];
            const Task& task = *batch_.tasks[one.segment];
            float* x = y_ + int64_t(one.read) * Hp;
            for (int i = 0; i < Hp; i += LANES) {
                floats total = {};
                for (int r = 0; r < one.reads; ++r) total += load(read_.x + int64_t(one.read + r) * Hp + i);
                store(x + i, total / float(one.reads));
            }
            if (batch_.read) std::memcpy(batch_.read + int64_t(number) * model_.hidden, x, 4 * model_.hidden);
            if (!task.classes) return;
            float* to = batch_.probabilities + one.answer;
            float top = -3.0e38f, whole = 0;
            for (int c = 0; c < task.classes; ++c) {
                floats total = {};
                const float* weight = task.head_weight + int64_t(c) * Hp;
                for (int i = 0; i < Hp; i += LANES) total += load(x + i) * load(weight + i);
                to[c] = sum(total) + task.head_bias[c];
                if (!(to[c] <= top)) top = to[c];
            }
            for (int c = 0; c < task.classes; ++c) whole += to[c] = std::exp(to[c] - top);
            for (int c = 0; c < task.classes; ++c) to[c] /= whole;
        });
    }

    const Model& model_;
    const Sizes size_;
    Team& team_;
    Space& space_;
    const Batch& batch_;
    std::vector<Sequence> sequences_;
    std::vector<Block> blocks_, ffn_blocks_, read_blocks_, read_ffn_blocks_, text_blocks_, first_blocks_;
    int block_ = 0, rows_ = 0, reads_ = 0, longest_ = 0, widest_ = 0, rank_ = 0;
    std::vector<Scratch> own_;
    Rows in_{}, read_{}, attended_{}, inner_{};
    float* y_ = nullptr;
    Low* qkv_ = nullptr;
    Low* read_q_ = nullptr;
};

// A team with the memory of its forwards; for one calling thread at a time.
struct Runner {
    explicit Runner(int threads) : team(threads), space(threads) {
        for (int member = 0; threads > 1 && member < threads; ++member)
            alone.push_back(std::make_unique<Runner>(1));
    }
    Team team;
    Space space;
    std::vector<std::unique_ptr<Runner>> alone;  // each member's own, for forwards apart
};

// Rows for each thread from which a batch is large enough to be divided.
constexpr int ROWS_APART = 64;

// The batch in as many parts as `members`, of about as many rows; nothing where that is not possible.
static std::vector<Batch> divide(const Model& model, const Batch& batch, int members) {
    std::vector<int64_t> until(batch.sequences + 1);  // rows of the sequences before
    for (int s = 0; s < batch.sequences; ++s)
        until[s + 1] = until[s] + batch.lengths[s] + batch.tasks[batch.segment_of[s]]->prompt;
    const int64_t rows = until.back();
    if (members == 1 || rows < members * ROWS_APART) return {};
    std::vector<Batch> parts;
    int first = 0, token = 0, answer = 0;
    for (int member = 0; member < members; ++member) {
        Batch part = batch;
        part.tokens += token, part.token_types += token;
        part.lengths += first, part.masks += first, part.segment_of += first;
        part.probabilities += answer;
        if (part.read) part.read += int64_t(first) * model.hidden;
        // A sequence belongs to the part that its middle is in.
        int end = first;
        while (end < batch.sequences && (until[end] + until[end + 1]) * members < 2 * rows * (member + 1)) {
            token += batch.lengths[end], answer += batch.tasks[batch.segment_of[end]]->classes;
            ++end;
        }
        part.sequences = end - first;
        if (!part.sequences || (until[end] - until[first]) * members > rows + rows / 8) return {};
        parts.push_back(part);
        first = end;
    }
    return parts;
}

// Together, a single sequence is answered soonest. A batch with enough for every thread is divided, so
// that nobody waits for anybody before the end: wherever others need a core for a moment, a team would
// stand still at its next barrier.
template <int PRECISION>
void forward(const Model& model, Runner& runner, const Batch& batch) {
    const std::vector<Batch> parts = divide(model, batch, runner.team.size());
    if (parts.empty()) {
        Forward<PRECISION>(model, runner.team, runner.space, batch).run();
        return;
    }
    runner.team.run([&](int me) {
        Forward<PRECISION>(model, runner.alone[me]->team, runner.alone[me]->space, parts[me]).run();
    });
}

template <int PRECISION>
void prompt(const Model& model, Runner& runner, const Task& task, float* hidden, void* qkv) {
    const int32_t none = 0;
    const Task* tasks[1] = {&task};
    const Batch batch{1, 1, nullptr, nullptr, &none, &none, &none, tasks, nullptr, nullptr};
    typedef typename Element<PRECISION ? Type::BF16 : Type::FLOAT>::type Low;
    Forward<PRECISION>(model, runner.team, runner.space, batch).prompt(hidden, static_cast<Low*>(qkv));
}

template <Type T>
void pack_ffn(const Model& model, const LayerWeights& layer, const uint16_t* neurons, int kept,
              uint32_t* in_panels, uint32_t* out_panels, int32_t* sums) {
    const int Hp = up(model.hidden, 64), per = Element<T>::per_unit;
    for (int n = 0; n < up(kept, 64); n += COLUMNS)
        pack_in<T>(layer, Hp, neurons + n, std::clamp(kept - n, 0, COLUMNS), in_panels + int64_t(n) * (Hp / per));
    for (int g = 0; g < Hp / COLUMNS; ++g)
        pack_out<T>(layer, model.ffn, g, neurons, kept,
                    out_panels + int64_t(g) * COLUMNS * (up(kept, 64) / per), sums + g * COLUMNS);
}

}  // namespace taskbone

// -- What Python calls -------------------------------------------------------------------------------

using namespace taskbone;

#define EXPORT extern "C" __attribute__((visibility("default")))

// Of the structures that Python hands over, in order: it has the same, or was not built with these.
EXPORT const int32_t taskbone_sizes[] = {
    sizeof(Norm), sizeof(Linear), sizeof(LayerWeights), sizeof(Model),
    sizeof(Delta), sizeof(TaskLayer), sizeof(Task), sizeof(Batch),
};

// Ask the kernel for what this build needs; 0 where it has it.
EXPORT int taskbone_prepare() {
#if defined(__AMX_TILE__)
    constexpr int REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    return syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) != 0;
#else
    return 0;
#endif
}

EXPORT Runner* taskbone_runner(int threads) { return new Runner(threads); }

EXPORT void taskbone_runner_free(Runner* runner) { delete runner; }

EXPORT void taskbone_forward(const Model* model, Runner* runner, const Batch* batch) {
    switch (model->precision) {
        case 0: return forward<0>(*model, *runner, *batch);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
        case 1: return forward<1>(*model, *runner, *batch);
        case 2: return forward<2>(*model, *runner, *batch);
#endif
        default: std::abort();
    }
}

EXPORT void taskbone_prompt(const Model* model, Runner* runner, const Task* task, float* hidden, void* qkv) {
    switch (model->precision) {
        case 0: return prompt<0>(*model, *runner, *task, hidden, qkv);
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
        case 1: return prompt<1>(*model, *runner, *task, hidden, qkv);
        case 2: return prompt<2>(*model, *runner, *task, hidden, qkv);
#endif
        default: std::abort();
    }
}

// `in_panels [Kp / 16][Hp units][16]`, `out_panels [Hp / 16][Kp units][16]`, `sums [Hp]`.
EXPORT void taskbone_pack_ffn(const Model* model, int layer, const uint16_t* neurons, int kept,
                              uint32_t* in_panels, uint32_t* out_panels, int32_t* sums) {
    const LayerWeights& weights = model->layer[layer];
    if (weights.bytes) pack_ffn<Type::BYTE>(*model, weights, neurons, kept, in_panels, out_panels, sums);
    else if (model->precision) pack_ffn<Type::BF16>(*model, weights, neurons, kept, in_panels, out_panels, sums);
    else pack_ffn<Type::FLOAT>(*model, weights, neurons, kept, in_panels, out_panels, sums);
}
