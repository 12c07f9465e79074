/* Group normalisation and SiLU of maps whose channels lie beside each other (NHWC), forward and backward.

       y = f(gamma (x - mean) / sqrt(variance + epsilon) + beta),      f(h) = h / (1 + exp(-h)), or h itself

   x is (batch, places, channels); gamma and beta are (batch, channels), since a block is told its level; mean and
   variance are those of a group of channels over all places of one picture. A picture stays in the cache from its
   statistics to its answer; torch's own kernels walk through NHWC maps many times over. Sums are float32 over the
   places of a channel and double over the channels of a group.

   `group_norm.py` compiles this once for float32, and once for bfloat16 (-DBF16), of which it sees the 16 bits. */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { LANES = 8, BESIDE = 2 };

#define INLINE static inline __attribute__((always_inline))

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t whole_vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits_vector __attribute__((vector_size(4 * LANES)));

/* `count` numbers, at most LANES of them, and zeros. */
#ifdef BF16
typedef uint16_t number;
typedef uint16_t half_vector __attribute__((vector_size(2 * LANES)));

INLINE vector read(const number *from, int count) {
    half_vector raw = {0};
    memcpy(&raw, from, 2 * count);
    return (vector)(__builtin_convertvector(raw, bits_vector) << 16);
}

/* The nearest, of two as near the even one. A NaN stays one: its first bits are kept, and a quiet one's are not 0. */
INLINE void write(number *to, vector value, int count) {
    bits_vector bits = (bits_vector)value;
    bits_vector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits_vector wrong = (bits_vector)((bits & 0x7fffffff) > 0x7f800000);
    half_vector out = __builtin_convertvector((rounded & ~wrong) | (0x7fc0 & wrong), half_vector);
    memcpy(to, &out, 2 * count);
}
#else
typedef float number;

INLINE vector read(const number *from, int count) {
    vector value = {0};
    memcpy(&value, from, 4 * count);
    return value;
}

INLINE void write(number *to, vector value, int count) { memcpy(to, &value, 4 * count); }
#endif

INLINE vector load(const float *from, int count) {
    vector value = {0};
    memcpy(&value, from, 4 * count);
    return value;
}

INLINE void store(float *to, vector value, int count) { memcpy(to, &value, 4 * count); }

/* `one` where the mask says so, else `other`. */
INLINE vector either(whole_vector mask, vector one, vector other) {
    return (vector)(((whole_vector)one & mask) | ((whole_vector)other & ~mask));
}

/* 1 / (1 + exp(-h)) to some 2e-7: exp as 2^whole times a polynomial. */
INLINE vector sigmoid(vector h) {
    const vector most = {126, 126, 126, 126, 126, 126, 126, 126};
    vector scaled = h * -1.44269504f;
    scaled = either(scaled > most, most, scaled);
    scaled = either(scaled < -most, -most, scaled);
    /* Adding and taking away 1.5 2^23 rounds to a whole number. */
    vector whole = (scaled + 12582912.0f) - 12582912.0f;
    vector rest = (scaled - whole) * 0.693147181f;
    vector power = rest * 1.38888889e-3f + 8.33333333e-3f;
    power = power * rest + 4.16666667e-2f;
    power = power * rest + 1.66666667e-1f;
    power = power * rest + 0.5f;
    power = power * rest + 1;
    power = power * rest + 1;
    whole_vector exponent = (__builtin_convertvector(whole, whole_vector) + 127) << 23;
    return 1 / (1 + power * (vector)exponent);
}

/* The sum over the channels of group g. */
static double sum_of(const float *values, int64_t g, int64_t width) {
    double sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; c++) sum += values[c];
    return sum;
}

/* The next four work on `many` vectors of `count` channels that lie beside each other: BESIDE of them where
   there are as many, which are a line of the cache in float32. */

/* Sums over the places of x less `middle`, or of its squares. */
INLINE void sums(const number *x, const float *middle, float *to, int64_t places, int64_t channels, int many, int count,
                 int squares) {
    vector total[BESIDE], from[BESIDE];
    for (int i = 0; i < many; i++) total[i] = (vector){0}, from[i] = load(middle + i * LANES, count);
    for (int64_t p = 0; p < places; p++)
        for (int i = 0; i < many; i++) {
            vector away = read(x + p * channels + i * LANES, count) - from[i];
            total[i] += squares ? away * away : away;
        }
    for (int i = 0; i < many; i++) store(to + i * LANES, total[i], count);
}

/* y = f(x a + b) at all places. */
INLINE void apply(const number *x, const float *a, const float *b, number *y, int64_t places, int64_t channels,
                  int many, int count, int silu) {
    vector scale[BESIDE], shift[BESIDE];
    for (int i = 0; i < many; i++) scale[i] = load(a + i * LANES, count), shift[i] = load(b + i * LANES, count);
    for (int64_t p = 0; p < places; p++)
        for (int i = 0; i < many; i++) {
            vector h = read(x + p * channels + i * LANES, count) * scale[i] + shift[i];
            write(y + p * channels + i * LANES, silu ? h * sigmoid(h) : h, count);
        }
}

/* The gradient by h = (x - middle) a + b at all places, and its sums: plain in dbeta, times x - middle in dgamma. */
INLINE void slopes(const number *x, const number *dy, const float *middle, const float *a, const float *b, float *dh,
                   float *dbeta, float *dgamma, int64_t places, int64_t channels, int many, int count, int silu) {
    vector from[BESIDE], scale[BESIDE], shift[BESIDE], first[BESIDE], second[BESIDE];
    for (int i = 0; i < many; i++) {
        from[i] = load(middle + i * LANES, count), scale[i] = load(a + i * LANES, count);
        shift[i] = load(b + i * LANES, count), first[i] = second[i] = (vector){0};
    }
    for (int64_t p = 0; p < places; p++)
        for (int i = 0; i < many; i++) {
            const int64_t at = p * channels + i * LANES;
            vector away = read(x + at, count) - from[i], d = read(dy + at, count);
            if (silu) {
                vector h = away * scale[i] + shift[i], share = sigmoid(h);
                d *= share * (1 + h * (1 - share));
            }
            store(dh + at, d, count);
            first[i] += d;
            second[i] += d * away;
        }
    for (int i = 0; i < many; i++) {
        store(dbeta + i * LANES, first[i], count);
        store(dgamma + i * LANES, second[i], count);
    }
}

/* dx = dh a + (x - middle) second + first at all places. */
INLINE void back(const number *x, const float *dh, const float *middle, const float *a, const float *first,
                 const float *second, number *dx, int64_t places, int64_t channels, int many, int count) {
    vector from[BESIDE], scale[BESIDE], f[BESIDE], s[BESIDE];
    for (int i = 0; i < many; i++) {
        from[i] = load(middle + i * LANES, count), scale[i] = load(a + i * LANES, count);
        f[i] = load(first + i * LANES, count), s[i] = load(second + i * LANES, count);
    }
    for (int64_t p = 0; p < places; p++)
        for (int i = 0; i < many; i++) {
            const int64_t at = p * channels + i * LANES;
            vector away = read(x + at, count) - from[i];
            write(dx + at, load(dh + at, count) * scale[i] + away * s[i] + f[i], count);
        }
}

/* Calls of f(c, many, count) for all channels. */
#define ALL_CHANNELS(f)                                                         \
    do {                                                                        \
        int64_t c = 0;                                                          \
        for (; c + BESIDE * LANES <= channels; c += BESIDE * LANES) f(c, BESIDE, LANES); \
        for (; c + LANES <= channels; c += LANES) f(c, 1, LANES);               \
        if (c < channels) f(c, 1, (int)(channels - c));                         \
    } while (0)

/* One picture; mean and inverse, 1 / sqrt(variance + epsilon), are of its groups. a and b have room for its channels. */
static void forward_one(const number *restrict x, const float *restrict gamma, const float *restrict beta,
                        number *restrict y, float *restrict mean, float *restrict inverse, float *restrict a,
                        float *restrict b, int64_t places, int64_t channels, int64_t groups, float epsilon, int silu) {
    const int64_t width = channels / groups;
    const double count = (double)(width * places);
    for (int64_t c = 0; c < channels; c++) b[c] = 0;
#define SUM(c, m, n) sums(x + c, b + c, a + c, places, channels, m, n, 0)
    ALL_CHANNELS(SUM);
    for (int64_t g = 0; g < groups; g++) mean[g] = (float)(sum_of(a, g, width) / count);
    for (int64_t c = 0; c < channels; c++) b[c] = mean[c / width];
#define SQUARES(c, m, n) sums(x + c, b + c, a + c, places, channels, m, n, 1)
    ALL_CHANNELS(SQUARES);
    for (int64_t g = 0; g < groups; g++) inverse[g] = (float)(1 / sqrt(sum_of(a, g, width) / count + epsilon));
    for (int64_t c = 0; c < channels; c++) {
        a[c] = inverse[c / width] * gamma[c];
        b[c] = beta[c] - mean[c / width] * a[c];
    }
#define WITH_SILU(c, m, n) apply(x + c, a + c, b + c, y + c, places, channels, m, n, 1)
#define WITHOUT(c, m, n) apply(x + c, a + c, b + c, y + c, places, channels, m, n, 0)
    if (silu) ALL_CHANNELS(WITH_SILU);
    else ALL_CHANNELS(WITHOUT);
}

/* One picture, from dy; `room` is for 5 + places times its channels. */
static void backward_one(const number *restrict x, const float *restrict gamma, const float *restrict beta,
                         const float *restrict mean, const float *restrict inverse, const number *restrict dy,
                         number *restrict dx, float *restrict dgamma, float *restrict dbeta, float *restrict room,
                         int64_t places, int64_t channels, int64_t groups, int silu) {
    const int64_t width = channels / groups;
    const double count = (double)(width * places);
    float *restrict middle = room, *restrict a = middle + channels, *restrict b = a + channels;
    float *restrict first = b + channels, *restrict second = first + channels, *restrict dh = second + channels;
    for (int64_t c = 0; c < channels; c++) {
        middle[c] = mean[c / width];
        a[c] = inverse[c / width] * gamma[c];
        b[c] = beta[c];
    }
#define SLOPES(c, m, n, silu) \
    slopes(x + c, dy + c, middle + c, a + c, b + c, dh + c, dbeta + c, dgamma + c, places, channels, m, n, silu)
#define SLOPES_SILU(c, m, n) SLOPES(c, m, n, 1)
#define SLOPES_PLAIN(c, m, n) SLOPES(c, m, n, 0)
    if (silu) ALL_CHANNELS(SLOPES_SILU);
    else ALL_CHANNELS(SLOPES_PLAIN);
    for (int64_t c = 0; c < channels; c++) {
        dgamma[c] *= inverse[c / width];
        first[c] = gamma[c] * dbeta[c];
        second[c] = gamma[c] * dgamma[c];
    }
    /* dx = inverse (gamma dh - mean of first - (x - mean) inverse mean of second), the means over the whole group. */
    for (int64_t g = 0; g < groups; g++) {
        double of_first = sum_of(first, g, width) / count, of_second = sum_of(second, g, width) / count;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            first[c] = (float)(-inverse[g] * of_first);
            second[c] = (float)(-inverse[g] * inverse[g] * of_second);
        }
    }
#define BACK(c, m, n) back(x + c, dh + c, middle + c, a + c, first + c, second + c, dx + c, places, channels, m, n)
    ALL_CHANNELS(BACK);
}

/* All pictures of a batch; mean and inverse come out, (batch, groups). Not 0 if there was no memory. */
int forward(const number *x, const float *gamma, const float *beta, number *y, float *mean, float *inverse,
            int64_t batch, int64_t places, int64_t channels, int64_t groups, float epsilon, int silu) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *room = malloc(2 * channels * sizeof(float));
        failed = room == NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch; n++)
            if (!failed)
                forward_one(x + n * places * channels, gamma + n * channels, beta + n * channels,
                            y + n * places * channels, mean + n * groups, inverse + n * groups, room, room + channels,
                            places, channels, groups, epsilon, silu);
        free(room);
    }
    return failed;
}

/* All pictures of a batch; dx, and dgamma and dbeta (batch, channels), come out. Not 0 if there was no memory. */
int backward(const number *x, const float *gamma, const float *beta, const float *mean, const float *inverse,
             const number *dy, number *dx, float *dgamma, float *dbeta, int64_t batch, int64_t places,
             int64_t channels, int64_t groups, int silu) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *room = malloc((5 + places) * channels * sizeof(float));
        failed = room == NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch; n++)
            if (!failed)
                backward_one(x + n * places * channels, gamma + n * channels, beta + n * channels, mean + n * groups,
                             inverse + n * groups, dy + n * places * channels, dx + n * places * channels,
                             dgamma + n * channels, dbeta + n * channels, room, places, channels, groups, silu);
        free(room);
    }
    return failed;
}
