// Matrix products of a few rows with weights in *panels*, and the packing of panels.
//
// A unit is 32 bits of a row: one float, two bf16 or four bytes. A panel holds 16 outputs of a linear
// map, unit by unit: `[units][16]`, 64 bytes each. All kernels for all instruction sets read
// the same layout, and each adds up in one fixed order, so that a row's result does not depend on
// which or how many rows stand beside it.
//
// Letters: `m` rows at once (at most ROWS), `lda` bytes from one row to the next.
#pragma once

#include "vector.h"

namespace taskbone {

constexpr int ROWS = 32;
constexpr int PANELS = 4;                // of one call
constexpr int COLUMNS = PANELS * LANES;  // of the result `[ROWS][COLUMNS]`

enum class Type { FLOAT, BF16, BYTE };

template <Type T> struct Element;
template <> struct Element<Type::FLOAT> { typedef float type; static constexpr int per_unit = 1; };
template <> struct Element<Type::BF16> { typedef bf16 type; static constexpr int per_unit = 2; };
// uint8 activations, int8 weights; results are int32 in the same 32 bits.
template <> struct Element<Type::BYTE> { typedef uint8_t type; static constexpr int per_unit = 4; };

inline int up(int count, int step) { return (count + step - 1) / step * step; }

// -- One register tile: R rows by P panels -------------------------------------------------------

template <Type T>
inline floats multiply_add(floats total, uint32_t unit, floats weights) {
    if constexpr (T == Type::FLOAT) {
        float x;
        std::memcpy(&x, &unit, 4);
        return total + x * weights;
    }
#if defined(__AVX512BF16__)
    if constexpr (T == Type::BF16) {
        return (floats)_mm512_dpbf16_ps(
            (__m512)total, (__m512bh)_mm512_set1_epi32(int(unit)), (__m512bh)weights);
    }
#endif
#if defined(__AVX512VNNI__)
    if constexpr (T == Type::BYTE) {
        return (floats)_mm512_dpbusd_epi32(
            (__m512i)total, _mm512_set1_epi32(int(unit)), (__m512i)weights);
    }
#endif
    __builtin_unreachable();
}

template <Type T, int R, int P>
inline __attribute__((always_inline)) void tile(
    const char* a, int64_t lda, const uint32_t* const* panels, int units, float* c, bool add) {
    floats total[R][P];
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p)
            total[r][p] = add ? load(c + r * COLUMNS + p * LANES) : floats{};
    for (int u = 0; u < units; ++u) {
        floats weights[P];
        for (int p = 0; p < P; ++p) std::memcpy(&weights[p], panels[p] + u * LANES, 64);
        for (int r = 0; r < R; ++r) {
            uint32_t unit;
            std::memcpy(&unit, a + r * lda + 4 * int64_t(u), 4);
            for (int p = 0; p < P; ++p) total[r][p] = multiply_add<T>(total[r][p], unit, weights[p]);
        }
    }
    for (int r = 0; r < R; ++r)
        for (int p = 0; p < P; ++p) store(c + r * COLUMNS + p * LANES, total[r][p]);
}

template <Type T, int P>
__attribute__((noinline)) void tiles(
    const char* a, int64_t lda, int m, const uint32_t* const* panels, int units, float* c, bool add) {
#if defined(__AVX512F__)
    constexpr int R = P == 4 ? 6 : P == 2 ? 10 : 12;
#else
    constexpr int R = 4;  // sixteen registers of half the width
#endif
    int r = 0;
    for (; r + R <= m; r += R) tile<T, R, P>(a + r * lda, lda, panels, units, c + r * COLUMNS, add);
    for (; r + 3 <= m; r += 3) tile<T, 3, P>(a + r * lda, lda, panels, units, c + r * COLUMNS, add);
    for (; r < m; ++r) tile<T, 1, P>(a + r * lda, lda, panels, units, c + r * COLUMNS, add);
}

// `c[m][P * 16] (+)= a[m][units] x panels`, by vector registers.
template <Type T>
inline void by_vectors(const char* a, int64_t lda, int m, const uint32_t* const* panels, int count,
                       int units, float* c, bool add) {
#if defined(__AVX512F__)
    if (count == 4) return tiles<T, 4>(a, lda, m, panels, units, c, add);
    if (count >= 2) {
        tiles<T, 2>(a, lda, m, panels, units, c, add);
        panels += 2, c += 2 * LANES, count -= 2;
    }
#endif
    for (; count > 0; --count, ++panels, c += LANES)
        tiles<T, 1>(a, lda, m, panels, units, c, add);
}

#if defined(__AMX_TILE__)
constexpr int WHOLE_UNITS = 16;  // products of so many units at a time are by tiles
#else
constexpr int WHOLE_UNITS = 1;
#endif

// -- AMX: tiles of 16 rows by 16 units, two by two -----------------------------------------------

#if defined(__AMX_TILE__)

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
};

#define TASKBONE_DOT(c, a, b)                                     \
    if constexpr (T == Type::BF16) _tile_dpbf16ps(c, a, b);       \
    else _tile_dpbusd(c, a, b)

// `units` is a multiple of 16. All 16 rows of a tile are read and all ROWS of `c` may be written: shaping
// tiles anew for the rows that there are would take longer than the spare rows do.
template <Type T>
inline void by_tiles(const char* a, int64_t lda, int m, const uint32_t* const* panels, int count,
                     int units, float* c, bool add) {
    asm volatile("" ::: "memory");  // the compiler does not know that tile loads read memory
    constexpr int ldc = COLUMNS * 4;
    const bool two_rows = m > 16;
    const char* a1 = a + 16 * lda;
    for (int p = 0; p < count; p += 2) {
        const uint32_t* b0 = panels[p];
        const uint32_t* b1 = p + 1 < count ? panels[p + 1] : nullptr;
        float* c0 = c + p * LANES;
        float* c1 = c0 + 16 * COLUMNS;
        if (add) {
            _tile_loadd(0, c0, ldc);
            if (b1) _tile_loadd(1, c0 + LANES, ldc);
            if (two_rows) _tile_loadd(2, c1, ldc);
            if (two_rows && b1) _tile_loadd(3, c1 + LANES, ldc);
        } else {
            _tile_zero(0);
            _tile_zero(1);
            _tile_zero(2);
            _tile_zero(3);
        }
        if (two_rows && b1) {
            for (int u = 0; u < units; u += 16) {
                _tile_loadd(4, a + 4 * int64_t(u), lda);
                _tile_loadd(6, b0 + u * LANES, 64);
                _tile_loadd(7, b1 + u * LANES, 64);
                _tile_loadd(5, a1 + 4 * int64_t(u), lda);
                TASKBONE_DOT(0, 4, 6);
                TASKBONE_DOT(1, 4, 7);
                TASKBONE_DOT(2, 5, 6);
                TASKBONE_DOT(3, 5, 7);
            }
        } else {
            for (int u = 0; u < units; u += 16) {
                _tile_loadd(4, a + 4 * int64_t(u), lda);
                _tile_loadd(6, b0 + u * LANES, 64);
                TASKBONE_DOT(0, 4, 6);
                if (two_rows) {
                    _tile_loadd(5, a1 + 4 * int64_t(u), lda);
                    TASKBONE_DOT(2, 5, 6);
                }
                if (b1) {
                    _tile_loadd(7, b1 + u * LANES, 64);
                    TASKBONE_DOT(1, 4, 7);
                }
            }
        }
        _tile_stored(0, c0, ldc);
        if (b1) _tile_stored(1, c0 + LANES, ldc);
        if (two_rows) _tile_stored(2, c1, ldc);
        if (two_rows && b1) _tile_stored(3, c1 + LANES, ldc);
    }
}

#undef TASKBONE_DOT
#endif

// A thread's tiles are ours from `open_tiles` to `close_tiles`: tiles 0 to 3 are results, 4 and 5 rows,
// 6 and 7 weights.
inline void open_tiles() {
#if defined(__AMX_TILE__)
    TileShapes shapes;
    for (int t = 0; t < 8; ++t) shapes.bytes[t] = 64, shapes.rows[t] = 16;
    asm volatile("" : : "r"(&shapes) : "memory");  // the intrinsic declares too little of it as read
    _tile_loadconfig(&shapes);
#endif
}

inline void close_tiles() {
#if defined(__AMX_TILE__)
    _tile_release();
#endif
}

// `c[m][count * 16] (+)= a[m][units] x panels[count][units]`; `c` is `[ROWS][COLUMNS]`, and ROWS rows of
// `a` can be read.
template <Type T>
inline void product(const char* a, int64_t lda, int m, const uint32_t* const* panels, int count,
                    int units, float* c, bool add = false) {
#if defined(__AMX_TILE__)
    if constexpr (T != Type::FLOAT) {
        if (units % WHOLE_UNITS == 0) return by_tiles<T>(a, lda, m, panels, count, units, c, add);
    }
#endif
    by_vectors<T>(a, lda, m, panels, count, units, c, add);
}

// -- Packing -------------------------------------------------------------------------------------

#if defined(__AVX512F__)
inline void transpose(__m512i r[16]) {
    __m512i t[16];
    for (int i = 0; i < 8; ++i) {
        t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
        r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
        r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
        t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xDD);
        t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
        t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xDD);
    }
    for (int i = 0; i < 4; ++i) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
        r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xDD);
        r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
        r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xDD);
    }
}
#endif

// A panel whose outputs are 16 rows of `units` each, wherever they lie: a transposition.
inline void pack_rows(const char* const rows[LANES], int units, uint32_t* panel) {
    int u = 0;
#if defined(__AVX512F__)
    for (; u + 16 <= units; u += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; ++i) r[i] = _mm512_loadu_si512(rows[i] + 4 * u);
        transpose(r);
        for (int i = 0; i < 16; ++i) _mm512_storeu_si512(panel + (u + i) * LANES, r[i]);
    }
#endif
    for (; u < units; ++u)
        for (int i = 0; i < LANES; ++i) std::memcpy(panel + u * LANES + i, rows[i] + 4 * u, 4);
}

// Element by element from one row after the other, 16 of each: a unit of 16 outputs.
#define TASKBONE_IN_TURN 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23, \
                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

inline void weave(const float* const from[1], uint32_t* to) { std::memcpy(to, from[0], 64); }

inline void weave(const bf16* const from[2], uint32_t* to) {
    halves rows[2];
    for (int e = 0; e < 2; ++e) std::memcpy(&rows[e], from[e], sizeof rows[e]);
    const auto both = __builtin_shufflevector(rows[0], rows[1], TASKBONE_IN_TURN);
    std::memcpy(to, &both, 64);
}

inline void weave(const uint8_t* const from[4], uint32_t* to) {
    bytes rows[4];
    for (int e = 0; e < 4; ++e) std::memcpy(&rows[e], from[e], sizeof rows[e]);
    const auto upper = (halves)__builtin_shufflevector(rows[0], rows[1], TASKBONE_IN_TURN);
    const auto lower = (halves)__builtin_shufflevector(rows[2], rows[3], TASKBONE_IN_TURN);
    const auto all_four = __builtin_shufflevector(upper, lower, TASKBONE_IN_TURN);
    std::memcpy(to, &all_four, 64);
}

#undef TASKBONE_IN_TURN

// `count` panels whose inputs are rows: row `i` holds input i of all outputs.
template <Type T>
inline void pack_columns(const char* const rows[], int units, int count, uint32_t* const* panels) {
    typedef typename Element<T>::type E;
    constexpr int per = Element<T>::per_unit;
    for (int u = 0; u < units; ++u)
        for (int p = 0; p < count; ++p) {
            const E* from[per];
            for (int e = 0; e < per; ++e)
                from[e] = reinterpret_cast<const E*>(rows[u * per + e]) + p * LANES;
            weave(from, panels[p] + u * LANES);
        }
}

}  // namespace taskbone
