/* Of bfloat16 maps on a processor that multiplies tiles of them (AMX), 16 rows of 32 numbers by 32 rows of 16: there a
   direct convolution is faster than one with a quarter of the multiplications.

   A map is read as one row of places, (picture, row, column), with a row of zeros before each picture and after the
   last and a column of zeros before each row, so that what a tap needs lies as far from every place as from any other:

       y[p] = sum over taps of w[tap] x[p + far(tap)],       far = (row of the tap - 1) (width + 1) + its column - 1

   and a tile can be any 16 places that follow each other. Answers at zeros are computed too, and dropped. */

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SIDE = 16, DEPTH = 32, TAPS = 9, TILE = SIDE * DEPTH, PAIR = 2 * SIDE };
/* Numbers of a tile: SIDE rows of DEPTH. A block of sums is PAIR by PAIR, of four products. */

/* Numbers of the map that a thread works on at once, about what its cache holds. */
enum { UNIT = 1 << 18 };

/* Linux wants to be asked for tiles. */
FOR_ANSWERS int ready(void) {
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, TILE_DATA = 18 };
    static int answer = -1;
    if (answer < 0) answer = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, TILE_DATA) == 0;
    return answer;
}

/* What was stored is in memory before it is loaded as a tile, of which GCC does not know that it reads. */
INLINE void stored(void) { __asm__ volatile("" ::: "memory"); }

static void begin_tiles(void) {
    struct {
        uint8_t palette, start, reserved[14];
        uint16_t bytes[16];
        uint8_t rows[16];
    } shape __attribute__((aligned(64))) = {.palette = 1};
    for (int tile = 0; tile < 8; tile++) shape.bytes[tile] = 64, shape.rows[tile] = SIDE;
    stored();
    _tile_loadconfig(&shape);
}

/* Tiles 0 to 3 are sums. */
INLINE void begin_sums(void) {
    stored();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
}

/* 16 numbers. */
INLINE __m512i bits(const number *from) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from)); }
INLINE __m512 widened(__m512i bits) { return (__m512)_mm512_slli_epi32(bits, 16); }
INLINE __m256i rounded(__m512 value) { return (__m256i)_mm512_cvtneps_pbh(value); }
INLINE __m512i rounded_bits(const float *from) { return _mm512_cvtepu16_epi32(rounded(_mm512_loadu_ps(from))); }
/* Numbers of two, one of each beside one of the other. */
INLINE __m512i paired(__m512i first, __m512i second) { return _mm512_or_si512(first, _mm512_slli_epi32(second, 16)); }

/* 16 rows of 16 pairs turned round. */
INLINE void turn(__m512i *rows) {
    __m512i other[16];
    for (int i = 0; i < 16; i += 2) {
        other[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        other[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    for (int i = 0; i < 16; i += 4)
        for (int j = 0; j < 2; j++) {
            rows[i + 2 * j] = _mm512_unpacklo_epi64(other[i + j], other[i + 2 + j]);
            rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(other[i + j], other[i + 2 + j]);
        }
    for (int i = 0; i < 4; i++)
        for (int half = 0; half < 16; half += 8) {
            other[half + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + 4 + i], 0x88);
            other[half + 4 + i] = _mm512_shuffle_i32x4(rows[half + i], rows[half + 4 + i], 0xdd);
        }
    for (int i = 0; i < 8; i++) {
        rows[i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0x88);
        rows[8 + i] = _mm512_shuffle_i32x4(other[i], other[8 + i], 0xdd);
    }
}

/* A map and its places. */
typedef struct {
    int64_t batch, height, width, line, places;
} map;

static map map_of(int64_t batch, int64_t height, int64_t width) {
    map m = {batch, height, width, width + 1, (batch * (height + 1) + 1) * (width + 1)};
    return m;
}

static int64_t far(map m, int tap) { return (tap / 3 - 1) * m.line + tap % 3 - 1; }

/* Where the channels of `count` places from `first` on lie in x, or the zeros, also after the last: row by row. */
static void find(const number *x, map m, int64_t channels, int64_t first, int64_t count, const number *zeros,
                 const number **to) {
    int64_t column = first % m.line, row = first / m.line % (m.height + 1), picture = first / m.line / (m.height + 1);
    for (int64_t i = 0; i < count; column = 0) {
        const int64_t left = m.line - column, end = left < count - i ? i + left : count;
        const int inside = row && picture < m.batch;
        if (inside && !column) to[i++] = zeros, column = 1;
        const number *at = inside ? x + ((picture * m.height + row - 1) * m.width + column - 1) * channels : zeros;
        for (; i < end; i++, at += inside ? channels : 0) to[i] = at;
        if (++row > m.height) row = 0, picture++;
    }
}

/* Weights as tiles, (out / 16, channels / 32, tap, 16 pairs of channels, 16, 2), zeros for channels that there are not.
   Each thread takes its share. */
static void weights_of(const float *w, int64_t channels, int64_t out, int turned, number *to) {
    const int64_t blocks = (channels + DEPTH - 1) / DEPTH;
#pragma omp for schedule(static) collapse(2)
    for (int64_t panel = 0; panel < out / SIDE; panel++)
        for (int64_t block = 0; block < blocks; block++)
            for (int tap = 0; tap < TAPS; tap++) {
                __m512i rows[16];
                number *tile = to + ((panel * blocks + block) * TAPS + tap) * TILE;
                const int64_t columns = panel * SIDE, from = block * DEPTH;
                const int filled = channels - from < DEPTH ? SIDE : DEPTH;
                for (int i = 0; i < 16; i++) {
                    if (turned) { /* w is (channels, 3, 3, out) */
                        const float *row = w + ((from + 2 * i) * TAPS + TAPS - 1 - tap) * out + columns;
                        rows[i] = 2 * i < filled ? paired(rounded_bits(row), rounded_bits(row + TAPS * out))
                                                 : _mm512_setzero_si512();
                        continue;
                    }
                    /* w is (out, 3, 3, channels) */
                    const float *row = w + ((columns + i) * TAPS + tap) * channels + from;
                    rows[i] = _mm512_zextsi256_si512(rounded(_mm512_loadu_ps(row)));
                    if (filled == DEPTH) rows[i] = _mm512_inserti64x4(rows[i], rounded(_mm512_loadu_ps(row + SIDE)), 1);
                }
                if (!turned) turn(rows);
                for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * DEPTH, rows[i]);
            }
}

/* The sums of PAIR places from `x` on and of one or two panels of answers: x is (block, place, DEPTH), with `plane`
   numbers from one block to the next. */
INLINE void sums_of(const number *x, int64_t plane, int64_t blocks, const int64_t *away, const number *first,
                    const number *second, float *to) {
    begin_sums();
    for (int64_t block = 0; block < blocks; block++, x += plane)
        for (int tap = 0; tap < TAPS; tap++, first += TILE, second += TILE) {
            const number *places = x + away[tap];
            _tile_loadd(4, places, 64);
            _tile_loadd(6, first, 64);
            _tile_dpbf16ps(0, 4, 6);
            _tile_loadd(5, places + TILE, 64);
            _tile_dpbf16ps(1, 5, 6);
            _tile_loadd(7, second, 64);
            _tile_dpbf16ps(2, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
        }
    _tile_stored(0, to, 128);
    _tile_stored(1, to + SIDE * PAIR, 128);
    _tile_stored(2, to + SIDE, 128);
    _tile_stored(3, to + SIDE * PAIR + SIDE, 128);
}

/* 16 sums, plus the bias and what is added, which may be NULL. */
INLINE __m512 answer(const float *sums, __m512 shift, const number *added) {
    __m512 sum = _mm512_load_ps(sums) + shift;
    if (added) sum += widened(bits(added));
    return sum;
}

/* Answers of `count` places, at most PAIR, and of one or two panels from `column` on: their sums, plus the bias and
   what is added, either of which may be NULL. */
INLINE void answers_of(const float *sums, const float *bias, const number *added, number *y, map m, int64_t out,
                       int64_t column, int panels, int64_t first, int64_t count) {
    const number *at[PAIR], *const outside = NULL;
    const __m512 shift = bias ? _mm512_loadu_ps(bias + column) : _mm512_setzero_ps();
    const __m512 next = bias && panels == 2 ? _mm512_loadu_ps(bias + column + SIDE) : _mm512_setzero_ps();
    find(y, m, out, first, count, outside, at);
    for (int64_t i = 0; i < count; i++, sums += PAIR) {
        if (at[i] == outside) continue;
        const int64_t here = at[i] - y + column;
        const __m512 one = answer(sums, shift, added ? added + here : NULL);
        if (panels == 1) {
            _mm256_storeu_si256((__m256i *)(y + here), rounded(one));
            continue;
        }
        const __m512 two = answer(sums + SIDE, next, added ? added + here + SIDE : NULL);
        _mm512_storeu_si512(y + here, (__m512i)_mm512_cvtne2ps_pbh(two, one));
    }
}

FOR_ANSWERS int convolve(const number *x, const float *w, const float *bias, const number *added, number *y,
                         int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t out, int turned) {
    const map m = map_of(batch, height, width);
    /* The places of the map, and how far from one its taps reach. */
    const int64_t from = m.line + 1, end = m.places - m.line, margin = m.line + 1;
    const int64_t blocks = (channels + DEPTH - 1) / DEPTH, threads = omp_get_max_threads();
    /* Places that a thread takes at once: as many as its cache holds, and so that all threads have as much to do. */
    int64_t most = UNIT / (blocks * DEPTH), rounds;
    most = most < PAIR ? PAIR : most;
    rounds = (end - from + threads * most - 1) / (threads * most);
    most = (end - from + threads * rounds - 1) / (threads * rounds);
    most = (most + PAIR - 1) / PAIR * PAIR;
    const int64_t plane = (most + 2 * margin) * DEPTH, size = out * blocks * DEPTH * TAPS;
    number *weights = (number *)room_for(&shared_room, &shared_size, size / 2);
    int64_t away[TAPS];
    for (int tap = 0; tap < TAPS; tap++) away[tap] = (far(m, tap) + margin) * DEPTH;
    int failed = weights == NULL;
#pragma omp parallel reduction(| : failed)
    {
        number *in = (number *)room_for(&own_room, &own_size, (blocks * plane + channels) / 2);
        failed |= in == NULL || weights == NULL;
        number *zeros = in ? in + blocks * plane : NULL;
        if (!failed) memset(zeros, 0, channels * sizeof(number));
        if (weights) weights_of(w, channels, out, turned, weights);
        begin_tiles();
        /* Every thread must come by here, also one without memory. */
#pragma omp for schedule(static) nowait
        for (int64_t first = from; first < end; first += most) {
            if (failed) continue;
            const int64_t last = end - first < most ? end : first + most;
            const number *at[PAIR];
            for (int64_t p = first - margin; p < last + margin; p += PAIR) {
                const int64_t count = last + margin - p < PAIR ? last + margin - p : PAIR;
                find(x, m, channels, p, count, zeros, at);
                for (int64_t i = 0; i < count; i++) {
                    number *to = in + (p + i - first + margin) * DEPTH;
                    int64_t c = 0;
                    for (; c + DEPTH <= channels; c += DEPTH, to += plane)
                        _mm512_store_si512(to, _mm512_loadu_si512(at[i] + c));
                    if (c < channels) {
                        const __m256i half = _mm256_loadu_si256((const __m256i *)(at[i] + c));
                        _mm512_store_si512(to, _mm512_zextsi256_si512(half));
                    }
                }
            }
            for (int64_t column = 0; column < out; column += PAIR) {
                const number *panel = weights + column * blocks * TAPS * DEPTH;
                const int panels = out - column < PAIR ? 1 : 2;
                float sums[2][PAIR * PAIR] __attribute__((aligned(64)));
                /* The sums before are made answers while the processor multiplies. */
                for (int64_t p = first, even = 0; p < last + PAIR; p += PAIR, even = !even) {
                    if (p < last)
                        sums_of(in + (p - first) * DEPTH, plane, blocks, away, panel,
                                panel + (panels - 1) * blocks * TAPS * TILE, sums[even]);
                    if (p > first)
                        answers_of(sums[!even], bias, added, y, m, out, column, panels, p - PAIR,
                                   last - p < 0 ? last - p + PAIR : PAIR);
                }
            }
        }
        _tile_release();
    }
    return failed;
}

/* Pairs of places that follow each other, for sums over places: of `count` places from `first` on, those that begin at
   an even one and, `odd` numbers further, those that begin at an odd one, as (channels / 16, pair, 16, 2) with `plane`
   numbers from one panel to the next. */
static void pairs_of(const number *x, map m, int64_t channels, int64_t first, int64_t begin, int64_t end,
                     const number *zeros, number *to, int64_t plane, int64_t odd) {
    const number *at[PAIR + 1];
    for (int64_t p = begin; p < end; p += PAIR) {
        const int64_t count = end - p < PAIR ? end - p : PAIR;
        find(x, m, channels, first + p, count + 1, zeros, at);
        for (int64_t i = 0; i < count; i++) {
            number *pair = to + (p + i) / 2 * PAIR + ((p + i) % 2 ? odd : 0);
            for (int64_t c = 0; c < channels; c += SIDE, pair += plane)
                _mm512_store_si512(pair, paired(bits(at[i] + c), bits(at[i + 1] + c)));
        }
    }
}

/* Slopes by places turned round, (out / 16, places / 32, 16, 32), of places from `begin` to `end` after the first;
   their sums are added to `sums`. */
static void slopes_of(const number *dy, map m, int64_t out, int64_t first, int64_t begin, int64_t end,
                      const number *zeros, number *to, int64_t plane, float *sums) {
    const number *at[PAIR];
    for (int64_t p = begin; p < end; p += PAIR) {
        find(dy, m, out, first + p, PAIR, zeros, at);
        number *tile = to + p * SIDE;
        for (int64_t c = 0; c < out; c += SIDE, tile += plane) {
            __m512i rows[16];
            __m512 sum = _mm512_loadu_ps(sums + c);
            for (int i = 0; i < 16; i++) {
                const __m512i one = bits(at[2 * i] + c), other = bits(at[2 * i + 1] + c);
                sum += widened(one) + widened(other);
                rows[i] = paired(one, other);
            }
            _mm512_storeu_ps(sums + c, sum);
            turn(rows);
            for (int i = 0; i < 16; i++) _mm512_store_si512(tile + i * DEPTH, rows[i]);
        }
    }
}

/* Sums over `depth` tiles of places of the slopes' one or two panels and the pairs' one or two, to rows and columns of
   dw, or added to what is there. */
INLINE void add_products(const number *slopes, int64_t second_slopes, const number *pairs, int64_t second_pairs,
                         int64_t depth, float *dw, int64_t row, int add) {
    float *below = dw + SIDE * row;
    const int rows = second_slopes != 0, columns = second_pairs != 0;
    begin_sums();
    if (add) {
        _tile_loadd(0, dw, row * 4);
        if (rows) _tile_loadd(1, below, row * 4);
        if (columns) _tile_loadd(2, dw + SIDE, row * 4);
        if (rows && columns) _tile_loadd(3, below + SIDE, row * 4);
    }
    for (int64_t k = 0; k < depth; k++, slopes += TILE, pairs += TILE) {
        _tile_loadd(4, slopes, 64);
        _tile_loadd(6, pairs, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(5, slopes + second_slopes, 64);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, pairs + second_pairs, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, dw, row * 4);
    if (rows) _tile_stored(1, below, row * 4);
    if (columns) _tile_stored(2, dw + SIDE, row * 4);
    if (rows && columns) _tile_stored(3, below + SIDE, row * 4);
}

/* A team of threads shares its places and the sums over them. A team is one thread, which needs nothing that another
   has made, but where weights are many, so that adding the teams' sums would take long: there all are one team. */
FOR_GRADIENTS int weight_gradient(const number *x, const number *dy, float *dw, float *dbias, int64_t batch,
                                  int64_t height, int64_t width, int64_t channels, int64_t out) {
    const map m = map_of(batch, height, width);
    const int64_t threads = omp_get_max_threads(), margin = m.line + 1, size = out * TAPS * channels;
    const int64_t tiles = (m.places - m.line - margin + DEPTH - 1) / DEPTH;
    const int alone = threads == 1 || tiles * DEPTH >= threads * out * channels / 16;
    const int64_t teams = alone ? threads : 1, share = (tiles + teams - 1) / teams;
    int64_t most = (alone ? 1 : threads) * UNIT / (DEPTH * (2 * channels + out)); /* Tiles of places at once. */
    most = most < 8 ? 8 : most;
    most = most < share ? most : share;
    const int64_t around = most * DEPTH + 2 * margin, pair_plane = (around + 1) / 2 * PAIR;
    const int64_t odd = channels / SIDE * pair_plane, slope_plane = most * TILE;
    const int64_t widest = channels > out ? channels : out;
    const int64_t needed = (2 * odd + out / SIDE * slope_plane) / 2, partial = teams > 1 ? size : 0;
    float *room = room_for(&shared_room, &shared_size, teams * (partial + needed) + threads * out + widest);
    if (room == NULL) return 1;
    float *biases = room + teams * (partial + needed);
    number *zeros = (number *)(biases + threads * out);
    memset(biases, 0, (threads * out + widest) * sizeof(float));
#pragma omp parallel
    {
        /* There can be fewer threads than there might have been. */
        const int64_t present = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t members = alone ? 1 : present, member = alone ? 0 : me;
        begin_tiles();
        for (int64_t team = alone ? me : 0; team < teams; team += alone ? present : 1) {
            float *sums = teams > 1 ? room + team * (partial + needed) : dw;
            number *pairs = (number *)(room + team * (partial + needed) + partial), *slopes = pairs + 2 * odd;
            const int64_t from = team * share, until = from + share < tiles ? from + share : tiles;
            if (from >= until) memset(sums, 0, size * sizeof(float));
            for (int64_t tile = from; tile < until; tile += most) {
                const int64_t count = until - tile < most ? until - tile : most, first = margin + tile * DEPTH;
                const int64_t filled = count * DEPTH + 2 * margin;
                slopes_of(dy, m, out, first, count * member / members * DEPTH, count * (member + 1) / members * DEPTH,
                          zeros, slopes, slope_plane, biases + me * out);
                pairs_of(x, m, channels, first - margin, filled * member / members, filled * (member + 1) / members,
                         zeros, pairs, pair_plane, odd);
                /* All threads or none come by here: a team of several is the only one. */
                if (!alone) {
#pragma omp barrier
                }
                const int64_t columns = (channels + PAIR - 1) / PAIR;
                const int64_t products = (out + PAIR - 1) / PAIR * columns * TAPS;
                for (int64_t i = products * member / members; i < products * (member + 1) / members; i++) {
                    const int64_t row = i / TAPS / columns * PAIR, column = i / TAPS % columns * PAIR, tap = i % TAPS;
                    const int64_t away = far(m, tap) + margin;
                    add_products(slopes + row / SIDE * slope_plane, out - row < PAIR ? 0 : slope_plane,
                                 pairs + column / SIDE * pair_plane + away / 2 * PAIR + (away % 2 ? odd : 0),
                                 channels - column < PAIR ? 0 : pair_plane, count,
                                 sums + (row * TAPS + tap) * channels + column, TAPS * channels, tile > from);
                }
                if (!alone) {
#pragma omp barrier
                }
            }
        }
        _tile_release();
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < out; row++) {
            dbias[row] = 0;
            for (int64_t t = 0; t < threads; t++) dbias[row] += biases[t * out + row];
            if (teams == 1) continue;
            for (int64_t i = row * TAPS * channels; i < (row + 1) * TAPS * channels; i++) {
                float sum = 0;
                for (int64_t t = 0; t < teams; t++) sum += room[t * (partial + needed) + i];
                dw[i] = sum;
            }
        }
    }
    return 0;
}
