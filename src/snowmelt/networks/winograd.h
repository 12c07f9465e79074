/* By the minimal filtering of Winograd with tiles of 4 x 4 answers (Lavin & Gray 2015, arXiv:1509.09308):

       y = A' ((G w G') . (B' x B)) A

   for each tile, where x is the 6 x 6 square around it and . multiplies place by place and sums over channels. That is
   36 products of matrices, (tiles, channels) by (channels, out), and a quarter of the multiplications of a direct
   convolution. A, B and G belong to the points 0, 1/r, -1/r, r, -r and infinity, r the root of 2: their rounding errors
   are half of those of the usual 1 and 2.

   The gradient by x is the same convolution of the other gradient with the turned weights; the one by w is
   G' ((B' x B) . (A dy A')) G, summed over tiles. Of maps in bfloat16 what is multiplied is rounded to it too, for
   processors that multiply that twice as fast. */

#ifdef BF16
#ifndef __AVX512BF16__
#error "this processor does not multiply bfloat16"
#endif
#include <immintrin.h>
enum { LANES = 16, LINE = 32, TOGETHER = 2 };
typedef uint32_t factor;
#else
enum { LANES = 8, LINE = 16, TOGETHER = 1 };
typedef float factor;
#endif
/* A number is one of a map, LINE of them are a line of the cache. A factor is what a product multiplies at once:
   TOGETHER numbers that follow each other along the sum. */

enum { PLACES = 36, PANEL = 16 };

#if defined(__AVX512VL__)
enum { ROWS = 12 }; /* of products at once: so many as there are registers for */
#else
enum { ROWS = 6 };
#endif

/* Factors and sums that a thread works on at once, about what its cache holds; and that threads work on together. */
enum { BLOCK = 1 << 16, CHUNK = 1 << 19 };

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vector load(const float *from) { return *(const anywhere *)from; }
INLINE void store(float *to, vector value) { *(anywhere *)to = value; }

#ifdef BF16
typedef __m512bh factors;

INLINE __m256i rounded(vector value) { return (__m256i)_mm512_cvtneps_pbh(value); }
INLINE __m512i widened(__m256i raw) { return _mm512_cvtepu16_epi32(raw); }

INLINE vector read(const number *from) {
    return (vector)_mm512_slli_epi32(widened(_mm256_loadu_si256((const __m256i *)from)), 16);
}
INLINE void write(number *to, vector value) { _mm256_storeu_si256((__m256i *)to, rounded(value)); }

/* Numbers beside each other as factors. */
INLINE void keep(factor *to, vector value) { write((number *)to, value); }

/* Numbers of two vectors as factors, one of each in every factor. */
INLINE void pair(factor *to, vector first, vector second) {
    const __m512i high = _mm512_slli_epi32(widened(rounded(second)), 16);
    _mm512_storeu_si512(to, _mm512_or_si512(high, widened(rounded(first))));
}

INLINE factors load_factors(const factor *from) { return (factors)_mm512_loadu_si512(from); }
INLINE vector multiply(vector sum, factor one, factors many) {
    return _mm512_dpbf16_ps(sum, (factors)_mm512_set1_epi32((int)one), many);
}
#else
typedef vector factors;

INLINE vector read(const number *from) { return load(from); }
INLINE void write(number *to, vector value) { store(to, value); }
INLINE void keep(factor *to, vector value) { store(to, value); }
INLINE void pair(factor *to, vector first, vector second) { (void)second, store(to, first); }
INLINE factors load_factors(const factor *from) { return load(from); }
INLINE vector multiply(vector sum, factor one, factors many) { return sum + one * many; }
#endif

/* One dimension of each transformation; `step` is between the numbers of a dimension. */
#define R 1.41421356f
INLINE void input(const vector *d, vector *to, int step) { /* B' */
    vector a = d[4 * step] - 2 * d[2 * step], b = (d[3 * step] - 2 * d[step]) * (1 / R);
    vector c = d[4 * step] - 0.5f * d[2 * step], e = (d[3 * step] - 0.5f * d[step]) * R;
    to[0] = d[0] - 2.5f * d[2 * step] + d[4 * step];
    to[step] = a + b, to[2 * step] = a - b;
    to[3 * step] = c + e, to[4 * step] = c - e;
    to[5 * step] = d[step] - 2.5f * d[3 * step] + d[5 * step];
}

INLINE void answer(const vector *m, vector *to, int step) { /* A' */
    vector a = m[step] + m[2 * step], b = (m[step] - m[2 * step]) * (1 / R);
    vector c = m[3 * step] + m[4 * step], e = (m[3 * step] - m[4 * step]) * R;
    to[0] = m[0] + a + c, to[step] = b + e, to[2 * step] = 0.5f * a + 2 * c;
    to[3 * step] = 0.5f * b + 2 * e + m[5 * step];
}

INLINE void slope(const vector *y, vector *to, int step) { /* A */
    vector a = y[0] + 0.5f * y[2 * step], b = (y[step] + 0.5f * y[3 * step]) * (1 / R);
    vector c = y[0] + 2 * y[2 * step], e = (y[step] + 2 * y[3 * step]) * R;
    to[0] = y[0], to[step] = a + b, to[2 * step] = a - b, to[3 * step] = c + e, to[4 * step] = c - e;
    to[5 * step] = y[3 * step];
}

INLINE void kernel(const vector *w, vector *to, int step) { /* G */
    vector a = w[0] * (-2 / 3.0f) - w[2 * step] * (1 / 3.0f), b = w[step] * (R / 3);
    vector c = w[0] * (1 / 6.0f) + w[2 * step] * (1 / 3.0f), e = w[step] * (R / 6);
    to[0] = w[0], to[step] = a - b, to[2 * step] = a + b, to[3 * step] = c + e, to[4 * step] = c - e;
    to[5 * step] = w[2 * step];
}

INLINE void kernel_back(const vector *u, vector *to, int step) { /* G' */
    vector a = u[step] + u[2 * step], b = u[3 * step] + u[4 * step];
    to[0] = u[0] - a * (2 / 3.0f) + b * (1 / 6.0f);
    to[step] = (u[2 * step] - u[step]) * (R / 3) + (u[3 * step] - u[4 * step]) * (R / 6);
    to[2 * step] = (b - a) * (1 / 3.0f) + u[5 * step];
}

/* c (rows, columns) = or += a (rows, depth) b (depth, columns), with steps between rows and along the depth, which is
   counted in factors. There are LANES columns, or twice as many: the others lie `beside` those in b. */
INLINE void product(int rows, int twice, const factor *a, int64_t row, int64_t along, const factor *b, int64_t below,
                    int64_t beside, float *c, int64_t c_row, int64_t depth, int add) {
    vector left[ROWS], right[ROWS];
    for (int r = 0; r < rows; r++) {
        left[r] = add ? load(c + r * c_row) : (vector){0};
        if (twice) right[r] = add ? load(c + r * c_row + LANES) : (vector){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        const factors first = load_factors(b + k * below), second = load_factors(b + k * below + (twice ? beside : 0));
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            const factor value = a[r * row + k * along];
            left[r] = multiply(left[r], value, first);
            if (twice) right[r] = multiply(right[r], value, second);
        }
    }
    for (int r = 0; r < rows; r++) {
        store(c + r * c_row, left[r]);
        if (twice) store(c + r * c_row + LANES, right[r]);
    }
}

/* The same for any number of rows. */
INLINE void strip(int64_t rows, int twice, const factor *a, int64_t row, int64_t along, const factor *b, int64_t below,
                  int64_t beside, float *c, int64_t c_row, int64_t depth, int add) {
    int64_t r = 0;
#define EACH(n)                      \
    for (; r + n <= rows; r += n)    \
        product(n, twice, a + r * row, row, along, b, below, beside, c + r * c_row, c_row, depth, add);
    EACH(ROWS) EACH(4) EACH(2) EACH(1)
}

/* The same for any number of panels of columns, which lie `beside` each other in b. */
static void products(int64_t rows, int64_t columns, const factor *a, int64_t row, int64_t along, const factor *b,
                     int64_t below, int64_t beside, float *c, int64_t c_row, int64_t depth, int add) {
    int64_t panel = 0;
    /* A panel is two vectors of float32, but one of bfloat16. */
    for (; panel + 2 * LANES <= columns; panel += 2 * LANES)
        strip(rows, 1, a, row, along, b + panel / PANEL * beside, below, LANES < (int)PANEL ? LANES : beside, c + panel,
              c_row, depth, add);
    if (LANES == (int)PANEL && panel < columns)
        strip(rows, 0, a, row, along, b + panel / PANEL * beside, below, 0, c + panel, c_row, depth, add);
}

/* A map and its tiles. */
typedef struct {
    int64_t batch, height, width, across, tiles;
} map;

static map map_of(int64_t batch, int64_t height, int64_t width) {
    map m = {batch, height, width, (width + 3) / 4, batch * ((height + 3) / 4) * ((width + 3) / 4)};
    return m;
}

/* The corner of the answers of a tile: picture, row, column. */
INLINE void corner(map m, int64_t tile, int64_t *picture, int64_t *row, int64_t *column) {
    int64_t each = m.tiles / m.batch;
    *picture = tile / each;
    *row = tile % each / m.across * 4;
    *column = tile % each % m.across * 4;
}

/* What a tile needs of a map: rows, from its first column on, which may lie before the map, since only the columns from
   `left` to `right` are read. Rows outside of the map are zeros, for as many numbers as SIDE places have. */
enum { SIDE = 6 };
typedef struct {
    const number *rows[SIDE];
    int left, right;
} square;

INLINE square square_of(const number *x, map m, int64_t channels, int64_t tile, int side, int before,
                        const number *zeros) {
    int64_t picture, row, column;
    square s = {.left = 0, .right = 0};
    for (int i = 0; i < side; i++) s.rows[i] = zeros;
    if (tile >= m.tiles) return s; /* No tile, but one of a pair. */
    corner(m, tile, &picture, &row, &column);
    row -= before, column -= before;
    s.left = column < 0 ? -column : 0, s.right = m.width - column < side ? m.width - column : side;
    for (int i = 0; i < side; i++)
        if (row + i >= 0 && row + i < m.height)
            s.rows[i] = x + ((picture * m.height + row + i) * m.width + column) * channels;
    return s;
}

INLINE vector at(const square *s, int i, int j, int64_t channels, int64_t c) {
    return j >= s->left && j < s->right ? read(s->rows[i] + j * channels + c) : (vector){0};
}

/* The next three ask memory for what the tile to the right will need, which is too scattered to be foreseen. At the end
   of a row that is something else, or nothing, which does no harm. */

/* B' x B of a tile, to every `step`-th row of channels from `to` on: numbers beside each other, or, for a sum over
   tiles, those of `count` = TOGETHER tiles as one factor. */
INLINE void input_tiles(const number *x, map m, int64_t channels, int64_t tile, int count, const number *zeros,
                        factor *to, int64_t step) {
    square s[TOGETHER];
    for (int t = 0; t < count; t++) s[t] = square_of(x, m, channels, tile + t, 6, 1, zeros);
    for (int64_t c = 0; c < channels; c += LANES) {
        vector d[PLACES], e[TOGETHER][PLACES], f[2][6] = {0};
        if (c % LINE == 0)
            for (int i = 0; i < 6; i++)
                for (int j = 6; j < 6 + 4 * count; j++) __builtin_prefetch(s[count - 1].rows[i] + j * channels + c);
        for (int t = 0; t < count; t++)
            for (int j = 0; j < 6; j++) {
                for (int i = 0; i < 6; i++) d[i * 6 + j] = at(&s[t], i, j, channels, c);
                input(d + j, e[t] + j, 6);
            }
        factor *place = to + (count == TOGETHER ? c : c / TOGETHER);
        for (int i = 0; i < 6; i++) {
            for (int t = 0; t < count; t++) input(e[t] + i * 6, f[t], 1);
            for (int j = 0; j < 6; j++, place += step)
                if (count == 1) keep(place, f[0][j]);
                else pair(place, f[0][j], f[1][j]);
        }
    }
}

/* A dy A' of TOGETHER tiles, as factors; their sums are added to `sums`. */
static void slope_tiles(const number *dy, map m, int64_t channels, int64_t tile, const number *zeros, factor *to,
                        int64_t step, float *sums) {
    square s[TOGETHER];
    for (int t = 0; t < TOGETHER; t++) s[t] = square_of(dy, m, channels, tile + t, 4, 0, zeros);
    for (int64_t c = 0; c < channels; c += LANES) {
        vector d[16], e[TOGETHER][24], f[2][6] = {0}, sum = {0};
        if (c % LINE == 0)
            for (int i = 0; i < 4; i++)
                for (int j = 4; j < 4 + 4 * TOGETHER; j++)
                    __builtin_prefetch(s[TOGETHER - 1].rows[i] + j * channels + c);
        for (int t = 0; t < TOGETHER; t++)
            for (int j = 0; j < 4; j++) {
                for (int i = 0; i < 4; i++) sum += d[i * 4 + j] = at(&s[t], i, j, channels, c);
                slope(d + j, e[t] + j, 4);
            }
        store(sums + c, load(sums + c) + sum);
        factor *place = to + c;
        for (int i = 0; i < 6; i++) {
            for (int t = 0; t < TOGETHER; t++) slope(e[t] + i * 4, f[t], 1);
            for (int j = 0; j < 6; j++, place += step) pair(place, f[0][j], f[1][j]);
        }
    }
}

/* A' m A of a tile, plus the bias and what is added, either of which may be NULL. */
static void answer_tile(const float *from, int64_t step, const float *bias, const number *added, number *y, map m,
                        int64_t channels, int64_t tile) {
    int64_t picture, row, column;
    corner(m, tile, &picture, &row, &column);
    int64_t rows = m.height - row < 4 ? m.height - row : 4, columns = m.width - column < 4 ? m.width - column : 4;
    const int64_t first = ((picture * m.height + row) * m.width + column) * channels;
    for (int64_t c = 0; c < channels; c += LANES) {
        if (c % LINE == 0)
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < columns; j++) __builtin_prefetch(y + first + (i * m.width + j + 4) * channels + c, 1);
        vector d[PLACES], e[24], f[4], shift = bias ? load(bias + c) : (vector){0};
        for (int j = 0; j < 6; j++) {
            for (int i = 0; i < 6; i++) d[i * 6 + j] = load(from + (i * 6 + j) * step + c);
            answer(d + j, e + j, 6);
        }
        for (int i = 0; i < rows; i++) {
            answer(e + i * 6, f, 1);
            for (int j = 0; j < columns; j++) {
                const int64_t here = first + (i * m.width + j) * channels + c;
                write(y + here, f[j] + shift + (added ? read(added + here) : (vector){0}));
            }
        }
    }
}

/* G w G' of PANEL values that lie beside each other in `w`, tap after tap, to every `step`-th PANEL from `to` on;
   of TOGETHER such, from one to the `next`. */
INLINE void kernel_panel(const float *w, int64_t tap, int64_t next, int turned, factor *to, int64_t step) {
    for (int half = 0; half < PANEL; half += LANES) {
        vector d[9], e[TOGETHER][18], f[2][6] = {0};
        for (int t = 0; t < TOGETHER; t++)
            for (int j = 0; j < 3; j++) {
                for (int i = 0; i < 3; i++)
                    d[i * 3 + j] = load(w + t * next + (turned ? 8 - i * 3 - j : i * 3 + j) * tap + half);
                kernel(d + j, e[t] + j, 3);
            }
        for (int i = 0; i < 6; i++) {
            for (int t = 0; t < TOGETHER; t++) kernel(e[t] + i * 3, f[t], 1);
            for (int j = 0; j < 6; j++) pair(to + (i * 6 + j) * step + half, f[0][j], f[1][j]);
        }
    }
}

/* Numbers from one place to the next in transformed matrices of (rows, columns): a line more than they have, since they
   are often a multiple of 4096 bytes, of which a cache keeps few. */
INLINE int64_t step_of(int64_t rows, int64_t columns) { return rows * columns + PANEL; }

/* The weights of a convolution, in panels: (place, columns / PANEL, depth / TOGETHER, PANEL). Each thread takes its
   share. */
static void weights_of(const float *w, int64_t depth, int64_t columns, int turned, factor *to) {
    const int64_t step = step_of(depth / TOGETHER, columns);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < columns; panel += PANEL)
        for (int64_t k = 0; k < depth; k += PANEL) {
            if (turned) { /* w is (depth, 3, 3, columns) */
                for (int64_t i = k; i < k + PANEL; i += TOGETHER)
                    kernel_panel(w + i * 9 * columns + panel, columns, 9 * columns, 1,
                                 to + (panel * depth + i * PANEL) / TOGETHER, step);
                continue;
            }
            /* w is (columns, 3, 3, depth): PANEL by PANEL numbers are turned round first. */
            float block[PANEL][9][PANEL];
            for (int column = 0; column < PANEL; column++)
                for (int tap = 0; tap < 9; tap++)
                    for (int i = 0; i < PANEL; i++)
                        block[i][tap][column] = w[((panel + column) * 9 + tap) * depth + k + i];
            for (int i = 0; i < PANEL; i += TOGETHER)
                kernel_panel(block[i][0], PANEL, 9 * PANEL, 0, to + (panel * depth + (k + i) * PANEL) / TOGETHER,
                             step);
        }
}

/* Tiles that a thread takes at once: as many as its cache holds, but where that does not hold the weights, which are
   `depth` by `out` at each place, so many that reading these again takes no longer than reading the tiles; and so that
   all threads have as much to do. */
static int64_t tiles_at_once(int64_t tiles, int64_t depth, int64_t out) {
    int64_t threads = omp_get_max_threads(), most = BLOCK / (PLACES * (depth + out));
    const int64_t even_reading = depth * out / (depth + out);
    if (PLACES * depth * out >= CHUNK && most < even_reading) most = even_reading;
    most = most < 2 * ROWS ? 2 * ROWS : most / ROWS * ROWS;
    int64_t rounds = (tiles + threads * most - 1) / (threads * most);
    int64_t even = (tiles + threads * rounds - 1) / (threads * rounds);
    return (even + ROWS - 1) / ROWS * ROWS;
}

FOR_ANSWERS int ready(void) { return 1; }

FOR_ANSWERS int convolve(const number *x, const float *w, const float *bias, const number *added, number *y,
                         int64_t batch, int64_t height, int64_t width, int64_t channels, int64_t out, int turned) {
    const map m = map_of(batch, height, width);
    const int64_t depth = channels / TOGETHER, most = tiles_at_once(m.tiles, depth, out);
    const int64_t in_step = step_of(most, depth), out_step = step_of(most, out), step = step_of(depth, out);
    factor *weights = (factor *)room_for(&shared_room, &shared_size, PLACES * step);
    int failed = weights == NULL;
#pragma omp parallel reduction(| : failed)
    {
        float *room = room_for(&own_room, &own_size, PLACES * (in_step + out_step) + SIDE * channels);
        failed |= room == NULL || weights == NULL;
        factor *in = (factor *)room;
        float *sums = room ? room + PLACES * in_step : NULL;
        number *zeros = room ? (number *)(sums + PLACES * out_step) : NULL;
        if (!failed) memset(zeros, 0, SIDE * channels * sizeof(number));
        if (weights) weights_of(w, channels, out, turned, weights);
        /* Every thread must come by here, also one without memory. */
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < m.tiles; first += most)
            if (!failed) {
                const int64_t count = m.tiles - first < most ? m.tiles - first : most;
                for (int64_t t = 0; t < count; t++)
                    input_tiles(x, m, channels, first + t, 1, zeros, in + t * depth, in_step);
                for (int64_t place = 0; place < PLACES; place++)
                    products(count, out, in + place * in_step, depth, 1, weights + place * step, PANEL, PANEL * depth,
                             sums + place * out_step, out, depth, 0);
                for (int64_t t = 0; t < count; t++)
                    answer_tile(sums + t * out, out_step, bias, added, y, m, out, first + t);
            }
    }
    return failed;
}

/* A team of threads shares its tiles and the sums over them. Where maps are large a team is one thread, which needs
   nothing that another has made; where weights are many, so that adding the teams' sums would take long, all threads
   are one team. */
FOR_GRADIENTS int weight_gradient(const number *x, const number *dy, float *dw, float *dbias, int64_t batch,
                                  int64_t height, int64_t width, int64_t channels, int64_t out) {
    const map m = map_of(batch, height, width);
    const int64_t threads = omp_get_max_threads();
    const int alone = m.tiles * (channels + out) >= 2 * threads * channels * out;
    /* Tiles, and below also what threads share of them, are counted in factors: TOGETHER at once. */
    const int64_t tiles = (m.tiles + TOGETHER - 1) / TOGETHER;
    const int64_t teams = alone ? threads : 1, share = (tiles + teams - 1) / teams;
    int64_t most = (alone ? BLOCK : CHUNK) / (PLACES * (channels + out));
    most = most < 32 ? 32 : most;
    /* Sums that no cache holds are read and written again no longer than what they are of is. */
    const int64_t even_reading = 2 * channels * out / (channels + out) / TOGETHER;
    if (!alone && most < even_reading) most = even_reading;
    most = most < share ? most : share;
    const int64_t in_step = step_of(most, channels), out_step = step_of(most, out), step = step_of(out, channels);
    const int64_t widest = channels > out ? channels : out, needed = PLACES * (step + in_step + out_step);
    float *room = room_for(&shared_room, &shared_size, teams * needed + threads * out + SIDE * widest);
    if (room == NULL) return 1;
    float *biases = room + teams * needed;
    number *zeros = (number *)(biases + threads * out);
    memset(biases, 0, (threads * out + SIDE * widest) * sizeof(float));
#pragma omp parallel
    {
        /* There can be fewer threads than there might have been. */
        const int64_t present = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t members = alone ? 1 : present, member = alone ? 0 : me;
        for (int64_t team = alone ? me : 0; team < teams; team += alone ? present : 1) {
            float *sums = room + team * needed;
            factor *in = (factor *)(sums + PLACES * step), *slopes = in + PLACES * in_step;
            const int64_t begin = team * share, end = begin + share < tiles ? begin + share : tiles;
            if (begin >= end) memset(sums, 0, PLACES * step * sizeof(float));
            for (int64_t first = begin; first < end; first += most) {
                const int64_t count = end - first < most ? end - first : most;
                for (int64_t t = count * member / members; t < count * (member + 1) / members; t++) {
                    const int64_t tile = (first + t) * TOGETHER;
                    input_tiles(x, m, channels, tile, TOGETHER, zeros, in + t * channels, in_step);
                    slope_tiles(dy, m, out, tile, zeros, slopes + t * out, out_step, biases + me * out);
                }
                /* All threads or none come by here: a team of several is the only one. */
                if (!alone) {
#pragma omp barrier
                }
                for (int64_t place = PLACES * member / members; place < PLACES * (member + 1) / members; place++)
                    products(out, channels, slopes + place * out_step, 1, out, in + place * in_step, channels, PANEL,
                             sums + place * step, channels, count, first > begin);
                if (!alone) {
#pragma omp barrier
                }
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < out; row++) {
            dbias[row] = 0;
            for (int64_t t = 0; t < threads; t++) dbias[row] += biases[t * out + row];
            for (int64_t c = 0; c < channels; c += LANES) {
                vector d[PLACES], e[18], f[3];
                for (int j = 0; j < 6; j++) {
                    for (int i = 0; i < 6; i++) {
                        const float *from = room + (i * 6 + j) * step + row * channels + c;
                        d[i * 6 + j] = load(from);
                        for (int64_t t = 1; t < teams; t++) d[i * 6 + j] += load(from + t * needed);
                    }
                    kernel_back(d + j, e + j, 6);
                }
                for (int i = 0; i < 3; i++) {
                    kernel_back(e + i * 6, f, 1);
                    for (int j = 0; j < 3; j++) store(dw + ((row * 9) + i * 3 + j) * channels + c, f[j]);
                }
            }
        }
    }
    return 0;
}
