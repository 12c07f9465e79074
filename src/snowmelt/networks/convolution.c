/* 3 x 3 convolutions of maps whose channels lie beside each other (NHWC), padded by one, and their gradients, by the
   minimal filtering of Winograd with tiles of 4 x 4 answers (Lavin & Gray 2015, arXiv:1509.09308):

       y = A' ((G w G') . (B' x B)) A

   for each tile, where x is the 6 x 6 square around it and . multiplies place by place and sums over channels. That is
   36 products of matrices, (tiles, channels) by (channels, out), and a quarter of the multiplications of a direct
   convolution. A, B and G belong to the points 0, 1, -1, 2, -2 and infinity.

   The gradient by x is the same convolution of the other gradient with the turned weights; the one by w is
   G' ((B' x B) . (A dy A')) G, summed over tiles. Weights are (out, 3, 3, channels); channels and out are multiples
   of 16. Sums are float32, in an order that does not depend on how many pictures there are.

   `convolution.py` compiles this. */

#include <omp.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { PLACES = 36, LANES = 8, PANEL = 16, LINE = 16, ALIGN = 64 }; /* LINE: numbers in a line of the cache */

#if defined(__AVX512VL__)
enum { ROWS = 12 }; /* of products at once: so many as there are registers for */
#else
enum { ROWS = 6 };
#endif

/* Numbers that a thread works on at once, about what its cache holds; and that threads work on together. */
enum { BLOCK = 1 << 16, CHUNK = 1 << 19 };

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef float anywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

INLINE vector load(const float *from) { return *(const anywhere *)from; }
INLINE void store(float *to, vector value) { *(anywhere *)to = value; }

/* One dimension of each transformation; `step` is between the numbers of a dimension. */
INLINE void input(const vector *d, vector *to, int step) { /* B' */
    vector a = d[4 * step] - 4 * d[2 * step], b = d[3 * step] - 4 * d[step];
    vector c = d[4 * step] - d[2 * step], e = 2 * (d[3 * step] - d[step]);
    to[0] = 4 * d[0] - 5 * d[2 * step] + d[4 * step];
    to[step] = a + b, to[2 * step] = a - b;
    to[3 * step] = c + e, to[4 * step] = c - e;
    to[5 * step] = 4 * d[step] - 5 * d[3 * step] + d[5 * step];
}

INLINE void answer(const vector *m, vector *to, int step) { /* A' */
    vector a = m[step] + m[2 * step], b = m[step] - m[2 * step];
    vector c = m[3 * step] + m[4 * step], e = m[3 * step] - m[4 * step];
    to[0] = m[0] + a + c, to[step] = b + 2 * e, to[2 * step] = a + 4 * c, to[3 * step] = b + 8 * e + m[5 * step];
}

INLINE void slope(const vector *y, vector *to, int step) { /* A */
    vector a = y[0] + y[2 * step], b = y[step] + y[3 * step];
    vector c = y[0] + 4 * y[2 * step], e = 2 * y[step] + 8 * y[3 * step];
    to[0] = y[0], to[step] = a + b, to[2 * step] = a - b, to[3 * step] = c + e, to[4 * step] = c - e;
    to[5 * step] = y[3 * step];
}

INLINE void kernel(const vector *w, vector *to, int step) { /* G */
    vector a = (w[0] + w[2 * step]) * (-1 / 6.0f), b = w[step] * (1 / 6.0f);
    vector c = w[0] * (1 / 24.0f) + w[2 * step] * (1 / 6.0f), e = w[step] * (1 / 12.0f);
    to[0] = w[0] * 0.25f, to[step] = a - b, to[2 * step] = a + b, to[3 * step] = c + e, to[4 * step] = c - e;
    to[5 * step] = w[2 * step];
}

INLINE void kernel_back(const vector *u, vector *to, int step) { /* G' */
    vector a = (u[step] + u[2 * step]) * (-1 / 6.0f), b = u[3 * step] + u[4 * step];
    vector c = (u[2 * step] - u[step]) * (1 / 6.0f) + (u[3 * step] - u[4 * step]) * (1 / 12.0f);
    to[0] = u[0] * 0.25f + a + b * (1 / 24.0f), to[step] = c, to[2 * step] = a + b * (1 / 6.0f) + u[5 * step];
}

/* c (rows, PANEL) = or += a (rows, depth) b (depth, PANEL), with steps between rows and along the depth. */
INLINE void product(int rows, const float *a, int64_t row, int64_t along, const float *b, int64_t below, float *c,
                    int64_t c_row, int64_t depth, int add) {
    vector left[ROWS], right[ROWS];
    for (int r = 0; r < rows; r++) {
        left[r] = add ? load(c + r * c_row) : (vector){0};
        right[r] = add ? load(c + r * c_row + LANES) : (vector){0};
    }
    for (int64_t k = 0; k < depth; k++) {
        vector first = load(b + k * below), second = load(b + k * below + LANES);
#pragma GCC unroll 12
        for (int r = 0; r < rows; r++) {
            float value = a[r * row + k * along];
            left[r] += value * first;
            right[r] += value * second;
        }
    }
    for (int r = 0; r < rows; r++) {
        store(c + r * c_row, left[r]);
        store(c + r * c_row + LANES, right[r]);
    }
}

/* The same for any number of rows. */
INLINE void products(int64_t rows, const float *a, int64_t row, int64_t along, const float *b, int64_t below, float *c,
                     int64_t c_row, int64_t depth, int add) {
    int64_t r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        product(ROWS, a + r * row, row, along, b, below, c + r * c_row, c_row, depth, add);
    a += r * row, c += r * c_row;
    switch (rows - r) {
#define REST(n) \
    case n: product(n, a, row, along, b, below, c, c_row, depth, add); break;
        REST(1) REST(2) REST(3) REST(4) REST(5)
#if defined(__AVX512VL__)
        REST(6) REST(7) REST(8) REST(9) REST(10) REST(11)
#endif
    }
}

/* Room that a thread keeps for the next call, as long as the process lives; NULL if there is none. */
static float *room_for(float **kept, int64_t *size, int64_t needed) {
    if (*size < needed) {
        free(*kept);
        *kept = NULL, *size = 0;
        if (posix_memalign((void **)kept, ALIGN, needed * sizeof(float))) *kept = NULL;
        else *size = needed;
    }
    return *kept;
}

static __thread float *shared_room, *own_room;
static __thread int64_t shared_size, own_size;

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
    const float *rows[SIDE];
    int left, right;
} square;

INLINE square square_of(const float *x, map m, int64_t channels, int64_t tile, int side, int before,
                        const float *zeros) {
    int64_t picture, row, column;
    corner(m, tile, &picture, &row, &column);
    row -= before, column -= before;
    square s = {.left = column < 0 ? -column : 0, .right = m.width - column < side ? m.width - column : side};
    for (int i = 0; i < side; i++) {
        int inside = row + i >= 0 && row + i < m.height;
        s.rows[i] = inside ? x + ((picture * m.height + row + i) * m.width + column) * channels : zeros;
    }
    return s;
}

INLINE vector read(const square *s, int i, int j, int64_t channels, int64_t c) {
    return j >= s->left && j < s->right ? load(s->rows[i] + j * channels + c) : (vector){0};
}

/* The next three ask memory for what the tile to the right will need, which is too scattered to be foreseen. At the end
   of a row that is something else, or nothing, which does no harm. */

/* B' x B of a tile, to every `step`-th row of channels from `to` on. */
static void input_tile(const float *x, map m, int64_t channels, int64_t tile, const float *zeros, float *to,
                       int64_t step) {
    const square s = square_of(x, m, channels, tile, 6, 1, zeros);
    for (int64_t c = 0; c < channels; c += LANES) {
        vector d[PLACES], e[PLACES];
        if (c % LINE == 0)
            for (int i = 0; i < 6; i++)
                for (int j = 6; j < 10; j++) __builtin_prefetch(s.rows[i] + j * channels + c);
        for (int j = 0; j < 6; j++) {
            for (int i = 0; i < 6; i++) d[i * 6 + j] = read(&s, i, j, channels, c);
            input(d + j, e + j, 6);
        }
        float *at = to + c;
        for (int i = 0; i < 6; i++) {
            input(e + i * 6, d, 1);
            for (int j = 0; j < 6; j++, at += step) store(at, d[j]);
        }
    }
}

/* A dy A' of a tile. */
static void slope_tile(const float *dy, map m, int64_t channels, int64_t tile, const float *zeros, float *to,
                       int64_t step) {
    const square s = square_of(dy, m, channels, tile, 4, 0, zeros);
    for (int64_t c = 0; c < channels; c += LANES) {
        vector d[24], e[24];
        if (c % LINE == 0)
            for (int i = 0; i < 4; i++)
                for (int j = 4; j < 8; j++) __builtin_prefetch(s.rows[i] + j * channels + c);
        for (int j = 0; j < 4; j++) {
            for (int i = 0; i < 4; i++) d[i * 4 + j] = read(&s, i, j, channels, c);
            slope(d + j, e + j, 4);
        }
        float *at = to + c;
        for (int i = 0; i < 6; i++) {
            slope(e + i * 4, d, 1);
            for (int j = 0; j < 6; j++, at += step) store(at, d[j]);
        }
    }
}

/* A' m A of a tile, plus the bias and what is added, either of which may be NULL. */
static void answer_tile(const float *from, int64_t step, const float *bias, const float *added, float *y, map m,
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
                const int64_t at = first + (i * m.width + j) * channels + c;
                store(y + at, f[j] + shift + (added ? load(added + at) : (vector){0}));
            }
        }
    }
}

/* G w G' of PANEL values that lie beside each other in `w`, tap after tap, to every `step`-th PANEL from `to` on. */
INLINE void kernel_panel(const float *w, int64_t tap, int turned, float *to, int64_t step) {
    for (int half = 0; half < PANEL; half += LANES) {
        vector d[18], e[18], f[6];
        for (int j = 0; j < 3; j++) {
            for (int i = 0; i < 3; i++) d[i * 3 + j] = load(w + (turned ? 8 - i * 3 - j : i * 3 + j) * tap + half);
            kernel(d + j, e + j, 3);
        }
        for (int i = 0; i < 6; i++) {
            kernel(e + i * 3, f, 1);
            for (int j = 0; j < 6; j++) store(to + (i * 6 + j) * step + half, f[j]);
        }
    }
}

/* Numbers from one place to the next in transformed matrices of (rows, columns): a line more than they have, since they
   are often a multiple of 4096 bytes, of which a cache keeps few. */
INLINE int64_t step_of(int64_t rows, int64_t columns) { return rows * columns + PANEL; }

/* The weights of a convolution, in panels: (place, columns / PANEL, depth, PANEL). Each thread takes its share. */
static void weights_of(const float *w, int64_t depth, int64_t columns, int turned, float *to) {
    const int64_t step = step_of(depth, columns);
#pragma omp for schedule(static)
    for (int64_t panel = 0; panel < columns; panel += PANEL)
        for (int64_t k = 0; k < depth; k += PANEL) {
            if (turned) { /* w is (depth, 3, 3, columns) */
                for (int64_t i = k; i < k + PANEL; i++)
                    kernel_panel(w + i * 9 * columns + panel, columns, 1, to + panel * depth + i * PANEL, step);
                continue;
            }
            /* w is (columns, 3, 3, depth): PANEL by PANEL numbers are turned round first. */
            float block[PANEL][9][PANEL];
            for (int column = 0; column < PANEL; column++)
                for (int tap = 0; tap < 9; tap++)
                    for (int i = 0; i < PANEL; i++)
                        block[i][tap][column] = w[((panel + column) * 9 + tap) * depth + k + i];
            for (int i = 0; i < PANEL; i++)
                kernel_panel(block[i][0], PANEL, 0, to + panel * depth + (k + i) * PANEL, step);
        }
}

/* Tiles that a thread takes at once: as many as its cache holds, and so that all threads have as much to do. */
static int64_t tiles_at_once(int64_t tiles, int64_t numbers) {
    int64_t threads = omp_get_max_threads(), most = BLOCK / (PLACES * numbers);
    most = most < 2 * ROWS ? 2 * ROWS : most / ROWS * ROWS;
    int64_t rounds = (tiles + threads * most - 1) / (threads * most);
    int64_t even = (tiles + threads * rounds - 1) / (threads * rounds);
    return (even + ROWS - 1) / ROWS * ROWS;
}

/* y (batch, height, width, out) of x (batch, height, width, channels).

   `turned`: w is (channels, 3, 3, out) and turned by half a circle, as for the gradient by x. `bias` and `added`, which
   is like y, may be NULL. Not 0 if there was no memory. */
int convolve(const float *x, const float *w, const float *bias, const float *added, float *y, int64_t batch,
             int64_t height, int64_t width, int64_t channels, int64_t out, int turned) {
    const map m = map_of(batch, height, width);
    const int64_t most = tiles_at_once(m.tiles, channels + out);
    const int64_t in_step = step_of(most, channels), out_step = step_of(most, out), step = step_of(channels, out);
    float *weights = room_for(&shared_room, &shared_size, PLACES * step);
    int failed = weights == NULL;
#pragma omp parallel reduction(| : failed)
    {
        float *in = room_for(&own_room, &own_size, PLACES * (in_step + out_step) + SIDE * channels);
        failed |= in == NULL || weights == NULL;
        float *products_of = in ? in + PLACES * in_step : NULL, *zeros = in ? products_of + PLACES * out_step : NULL;
        if (!failed) memset(zeros, 0, SIDE * channels * sizeof(float));
        if (weights) weights_of(w, channels, out, turned, weights);
        /* Every thread must come by here, also one without memory. */
#pragma omp for schedule(static) nowait
        for (int64_t first = 0; first < m.tiles; first += most)
            if (!failed) {
                const int64_t count = m.tiles - first < most ? m.tiles - first : most;
                for (int64_t t = 0; t < count; t++)
                    input_tile(x, m, channels, first + t, zeros, in + t * channels, in_step);
                for (int64_t place = 0; place < PLACES; place++)
                    for (int64_t panel = 0; panel < out; panel += PANEL)
                        products(count, in + place * in_step, channels, 1,
                                 weights + place * step + panel * channels, PANEL,
                                 products_of + place * out_step + panel, out, channels, 0);
                for (int64_t t = 0; t < count; t++)
                    answer_tile(products_of + t * out, out_step, bias, added, y, m, out, first + t);
            }
    }
    return failed;
}

/* dw (out, 3, 3, channels) and dbias (out) from x and dy. Not 0 if there was no memory.

   A team of threads shares its tiles and the sums over them. Where maps are large a team is one thread, which needs
   nothing that another has made; where weights are many, so that adding the teams' sums would take long, all threads
   are one team. */
int weight_gradient(const float *x, const float *dy, float *dw, float *dbias, int64_t batch, int64_t height,
                    int64_t width, int64_t channels, int64_t out) {
    const map m = map_of(batch, height, width);
    const int64_t threads = omp_get_max_threads();
    const int alone = m.tiles * (channels + out) >= 2 * threads * channels * out;
    const int64_t teams = alone ? threads : 1, share = (m.tiles + teams - 1) / teams;
    int64_t most = (alone ? BLOCK : CHUNK) / (PLACES * (channels + out));
    most = most < 32 ? 32 : most;
    most = most < share ? most : share;
    const int64_t in_step = step_of(most, channels), out_step = step_of(most, out), step = step_of(out, channels);
    const int64_t widest = channels > out ? channels : out, needed = PLACES * (step + in_step + out_step) + out;
    float *room = room_for(&shared_room, &shared_size, teams * needed + SIDE * widest);
    if (room == NULL) return 1;
    float *zeros = room + teams * needed;
    memset(zeros, 0, SIDE * widest * sizeof(float));
#pragma omp parallel
    {
        /* There can be fewer threads than there might have been. */
        const int64_t present = omp_get_num_threads(), me = omp_get_thread_num();
        const int64_t members = alone ? 1 : present, member = alone ? 0 : me;
        for (int64_t team = alone ? me : 0; team < teams; team += alone ? present : 1) {
            float *bias = room + team * needed, *sums = bias + out, *in = sums + PLACES * step;
            float *slopes = in + PLACES * in_step;
            const int64_t begin = team * share, end = begin + share < m.tiles ? begin + share : m.tiles;
            if (member == 0) memset(bias, 0, (out + (begin < end ? 0 : PLACES * step)) * sizeof(float));
            for (int64_t first = begin; first < end; first += most) {
                const int64_t count = end - first < most ? end - first : most;
                for (int64_t t = count * member / members; t < count * (member + 1) / members; t++) {
                    input_tile(x, m, channels, first + t, zeros, in + t * channels, in_step);
                    slope_tile(dy, m, out, first + t, zeros, slopes + t * out, out_step);
                }
                /* All threads or none come by here: a team of several is the only one. */
                if (!alone) {
#pragma omp barrier
                }
                for (int64_t place = PLACES * member / members; place < PLACES * (member + 1) / members; place++)
                    for (int64_t panel = 0; panel < channels; panel += PANEL)
                        products(out, slopes + place * out_step, 1, out, in + place * in_step + panel, channels,
                                 sums + place * step + panel, channels, count, first > begin);
                /* The second row of A sums: the product of both is the sum over a tile. */
                if (member == 0)
                    for (int64_t t = 0; t < count; t++)
                        for (int64_t c = 0; c < out; c++) bias[c] += slopes[7 * out_step + t * out + c];
                if (!alone) {
#pragma omp barrier
                }
            }
        }
#pragma omp barrier
#pragma omp for schedule(static)
        for (int64_t row = 0; row < out; row++) {
            dbias[row] = 0;
            for (int64_t t = 0; t < teams; t++) dbias[row] += room[t * needed + row];
            for (int64_t c = 0; c < channels; c += LANES) {
                vector d[PLACES], e[18], f[3];
                for (int j = 0; j < 6; j++) {
                    for (int i = 0; i < 6; i++) {
                        const float *from = room + out + (i * 6 + j) * step + row * channels + c;
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
