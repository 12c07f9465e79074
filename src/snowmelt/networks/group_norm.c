/* Group normalisation and SiLU of maps whose channels lie beside each other (NHWC), forward and backward.

       y = f(gamma (x - mean) / sqrt(variance + epsilon) + beta),      f(h) = h / (1 + exp(-h)), or h itself

   x is (batch, places, channels); mean and variance are those of a group of channels over all places of one picture.
   gamma and beta are weights of a channel, but where a block is told its level, by a scale and a shift of each channel,
   (batch, 2, channels): then they are gamma (1 + scale) and beta (1 + scale) + shift. A picture is walked through
   twice, a few places at a time; torch's own kernels walk through NHWC maps many times over. Sums are float32 over the
   places of a channel, of differences from a typical value of it, and double over the channels of a group.

   `group_norm.py` compiles this for float32 or for bfloat16 (-DBF16), of which it sees the 16 bits: `forward`, or with
   -DGRADIENTS `backward`. */

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "maps.h"

#if defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define WIDE
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
enum { TYPICAL = 7 }; /* Not 8, which would lie in one column of most maps. */
enum { SOME = 32 };   /* Places that go by at once. */

typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t whole_vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits_vector __attribute__((vector_size(4 * LANES)));

/* `count` numbers, at most LANES of them, and zeros. */
INLINE vector load(const float *from, int count) {
    vector value = {0};
#ifdef WIDE
    if (count < LANES) return _mm512_maskz_loadu_ps((1 << count) - 1, from);
#endif
    memcpy(&value, from, 4 * count);
    return value;
}

INLINE void store(float *to, vector value, int count) {
#ifdef WIDE
    if (count < LANES) {
        _mm512_mask_storeu_ps(to, (1 << count) - 1, value);
        return;
    }
#endif
    memcpy(to, &value, 4 * count);
}

/* The same of a map. */
#ifdef BF16
typedef uint16_t half_vector __attribute__((vector_size(2 * LANES)));

INLINE vector read(const number *from, int count) {
#ifdef WIDE
    const __m256i raw = count < LANES ? _mm256_maskz_loadu_epi16((1 << count) - 1, from)
                                      : _mm256_loadu_si256((const __m256i *)from);
    return (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16);
#else
    half_vector raw = {0};
    memcpy(&raw, from, 2 * count);
    return (vector)(__builtin_convertvector(raw, bits_vector) << 16);
#endif
}

/* The nearest, of two as near the even one. A NaN stays one. A processor that does it by itself makes 0 of the
   smallest, below 1e-38. */
INLINE void write(number *to, vector value, int count) {
#if defined(WIDE) && defined(__AVX512BF16__)
    const __m256i out = (__m256i)_mm512_cvtneps_pbh(value);
#else
    bits_vector bits = (bits_vector)value;
    bits_vector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits_vector wrong = (bits_vector)((bits & 0x7fffffff) > 0x7f800000);
    half_vector out = __builtin_convertvector((rounded & ~wrong) | (0x7fc0 & wrong), half_vector);
#endif
#ifdef WIDE
    if (count < LANES) {
        _mm256_mask_storeu_epi16(to, (1 << count) - 1, (__m256i)out);
        return;
    }
#endif
    memcpy(to, &out, 2 * count);
}
#else
INLINE vector read(const number *from, int count) { return load(from, count); }
INLINE void write(number *to, vector value, int count) { store(to, value, count); }
#endif

/* Between -most and most; what is no number stays so. */
INLINE vector bounded(vector value, float most) {
    const vector high = (vector){0} + most;
#ifdef WIDE
    return _mm512_max_ps(-high, _mm512_min_ps(high, value));
#else
    const whole_vector over = value > high, low = (whole_vector)-high;
    const vector below = (vector)(((whole_vector)high & over) | ((whole_vector)value & ~over));
    const whole_vector under = below < -high;
    return (vector)((low & under) | ((whole_vector)below & ~under));
#endif
}

/* value 2^whole, of a whole number from -126 to 126. */
INLINE vector scaled_by(vector value, vector whole) {
#ifdef WIDE
    return _mm512_scalef_ps(value, whole);
#else
    return value * (vector)((__builtin_convertvector(whole, whole_vector) + 127) << 23);
#endif
}

/* 1 / value to some 1e-7, or 6e-5 where 16 bits are kept, which are 4e-3 apart. */
INLINE vector inverse_of(vector value) {
#ifdef WIDE
    const vector near = _mm512_rcp14_ps(value);
#ifdef BF16
    return near;
#endif
    return near * (2 - value * near);
#else
    return 1 / value;
#endif
}

/* 1 / (1 + exp(-h)) to some 2e-7, or 7e-5 where 16 bits are kept: exp as 2^whole times a polynomial. */
INLINE vector sigmoid(vector h) {
    vector scaled = bounded(h * -1.44269504f, 126);
    /* Adding and taking away 1.5 2^23 rounds to a whole number. */
    vector whole = (scaled + 12582912.0f) - 12582912.0f;
    vector rest = (scaled - whole) * 0.693147181f;
#ifdef BF16
    vector power = rest * 4.16666667e-2f + 1.675e-1f; /* A little more than 1/6, for those left out: to 7e-6. */
#else
    vector power = rest * 1.38888889e-3f + 8.33333333e-3f;
    power = power * rest + 4.16666667e-2f;
    power = power * rest + 1.66666667e-1f;
#endif
    power = power * rest + 0.5f;
    power = power * rest + 1;
    power = power * rest + 1;
    return inverse_of(1 + scaled_by(power, whole));
}

/* Calls of f(c, vectors, count) for `vectors` vectors of `count` channels from c on, all channels in the end. */
#define ALL_CHANNELS(f)                                                             \
    do {                                                                            \
        int64_t c = 0;                                                              \
        for (; c + 4 * LANES <= channels; c += 4 * LANES) f(c, 4, LANES);           \
        if (c + 2 * LANES <= channels) f(c, 2, LANES), c += 2 * LANES;              \
        if (c + LANES <= channels) f(c, 1, LANES), c += LANES;                      \
        if (c < channels) f(c, 1, (int)(channels - c));                             \
    } while (0)

/* The same for `n` places from p on, all places in the end: what belongs to channels stays in registers while they go
   by. Of maps that is not the order in which they lie in memory, so each function asks for what comes next. */
#define ALL_PLACES(f)                                                               \
    for (int64_t p = 0; p < places; p += SOME) {                                    \
        const int64_t n = places - p < SOME ? places - p : SOME;                    \
        ALL_CHANNELS(f);                                                            \
    }
#define EACH_PLACE for (int64_t p = 0; p < places; p++)
#define EACH_VECTOR for (int64_t v = 0, c = 0; v < vectors; v++, c += LANES)

INLINE void typical_of(const number *x, float *to, int64_t places, int64_t channels, int vectors, int count) {
    const int64_t some = places < TYPICAL ? places : TYPICAL;
    EACH_VECTOR {
        vector sum = {0};
        for (int64_t i = 0; i < some; i++)
            sum += read(x + (2 * i + 1) * places / (2 * some) * channels + c, count) * (1.0f / some);
        store(to + c, sum, count);
    }
}

/* The mean of each channel over some places, spread over the map. */
static void typical(const number *x, float *to, int64_t places, int64_t channels) {
#define TAKE(c, vectors, count) typical_of(x + c, to + c, places, channels, vectors, count)
    ALL_CHANNELS(TAKE);
}

INLINE void sums_of(const number *x, const float *from, float *first, float *second, int64_t places, int64_t channels,
                    int vectors, int count) {
    vector middle[vectors], sum[vectors], squares[vectors];
    EACH_VECTOR {
        middle[v] = load(from + c, count);
        sum[v] = load(first + c, count), squares[v] = load(second + c, count);
    }
    EACH_PLACE {
        const number *at = x + p * channels;
        EACH_VECTOR {
            __builtin_prefetch(at + SOME * channels + c);
            const vector away = read(at + c, count) - middle[v];
            sum[v] += away, squares[v] += away * away;
        }
    }
    EACH_VECTOR store(first + c, sum[v], count), store(second + c, squares[v], count);
}

/* Sums over the places of x - from, and of its squares. */
static void sums(const number *x, const float *from, float *first, float *second, int64_t places, int64_t channels) {
    for (int64_t c = 0; c < channels; c++) first[c] = second[c] = 0;
#define SUM(c, vectors, count) \
    sums_of(x + p * channels + c, from + c, first + c, second + c, n, channels, vectors, count)
    ALL_PLACES(SUM)
}

INLINE void applied(const number *x, const float *a, const float *b, number *y, int64_t places, int64_t channels,
                    int silu, int vectors, int count) {
    vector as[vectors], bs[vectors];
    EACH_VECTOR as[v] = load(a + c, count), bs[v] = load(b + c, count);
    EACH_PLACE {
        EACH_VECTOR {
            const vector h = read(x + p * channels + c, count) * as[v] + bs[v];
            write(y + p * channels + c, silu ? h * sigmoid(h) : h, count);
        }
    }
}

/* y = f(x a + b) at all places. */
INLINE void apply(const number *x, const float *a, const float *b, number *y, int64_t places, int64_t channels,
                  int silu) {
#define APPLY(c, vectors, count) \
    applied(x + p * channels + c, a + c, b + c, y + p * channels + c, n, channels, silu, vectors, count)
    ALL_PLACES(APPLY)
}

INLINE void slopes_of(const number *x, const number *dy, const float *middle, const float *a, const float *b, float *dh,
                      float *dbeta, float *dgamma, int64_t places, int64_t channels, int silu, int vectors, int count) {
    vector middles[vectors], as[vectors], bs[vectors], sum[vectors], products[vectors];
    EACH_VECTOR {
        middles[v] = load(middle + c, count), as[v] = load(a + c, count), bs[v] = load(b + c, count);
        sum[v] = load(dbeta + c, count), products[v] = load(dgamma + c, count);
    }
    EACH_PLACE {
        const number *at = x + p * channels, *slope = dy + p * channels;
        EACH_VECTOR {
            __builtin_prefetch(at + SOME * channels + c);
            __builtin_prefetch(slope + SOME * channels + c);
            const vector away = read(at + c, count) - middles[v];
            vector d = read(slope + c, count);
            if (silu) {
                const vector h = away * as[v] + bs[v], share = sigmoid(h);
                d *= share * (1 + h * (1 - share));
            }
            store(dh + p * channels + c, d, count);
            sum[v] += d, products[v] += d * away;
        }
    }
    EACH_VECTOR store(dbeta + c, sum[v], count), store(dgamma + c, products[v], count);
}

/* The gradient by h = (x - middle) a + b at all places, and its sums: plain in dbeta, times x - middle in dgamma. */
INLINE void slopes(const number *x, const number *dy, const float *middle, const float *a, const float *b, float *dh,
                   float *dbeta, float *dgamma, int64_t places, int64_t channels, int silu) {
    for (int64_t c = 0; c < channels; c++) dbeta[c] = dgamma[c] = 0;
#define SLOPE(c, vectors, count)                                                                              \
    slopes_of(x + p * channels + c, dy + p * channels + c, middle + c, a + c, b + c, dh + p * channels + c, \
              dbeta + c, dgamma + c, n, channels, silu, vectors, count)
    ALL_PLACES(SLOPE)
}

INLINE void back_of(const number *x, const float *dh, const float *middle, const float *a, const float *first,
                    const float *second, number *dx, int64_t places, int64_t channels, int vectors, int count) {
    vector middles[vectors], as[vectors], firsts[vectors], seconds[vectors];
    EACH_VECTOR {
        middles[v] = load(middle + c, count), as[v] = load(a + c, count);
        firsts[v] = load(first + c, count), seconds[v] = load(second + c, count);
    }
    EACH_PLACE {
        const float *slope = dh + p * channels;
        number *to = dx + p * channels;
        EACH_VECTOR {
            __builtin_prefetch(slope + SOME * channels + c);
            __builtin_prefetch(to + SOME * channels + c, 1);
            const vector away = read(x + p * channels + c, count) - middles[v];
            write(to + c, load(slope + c, count) * as[v] + away * seconds[v] + firsts[v], count);
        }
    }
}

/* dx = dh a + (x - middle) second + first at all places. */
static void back(const number *x, const float *dh, const float *middle, const float *a, const float *first,
                 const float *second, number *dx, int64_t places, int64_t channels) {
#define BACK(c, vectors, count)                                                                    \
    back_of(x + p * channels + c, dh + p * channels + c, middle + c, a + c, first + c, second + c, \
            dx + p * channels + c, n, channels, vectors, count)
    ALL_PLACES(BACK)
}

/* gamma and beta of one picture, which may be told something or not. */
static void entered(const float *gamma, const float *beta, const float *told, float *a, float *b, int64_t channels) {
    for (int64_t c = 0; c < channels; c++) {
        const float scale = told ? 1 + told[c] : 1;
        a[c] = gamma[c] * scale;
        b[c] = beta[c] * scale + (told ? told[channels + c] : 0);
    }
}

/* One picture; mean and inverse, 1 / sqrt(variance + epsilon), are of its groups. `room` holds 5 times its channels. */
static void forward_one(const number *x, const float *gamma, const float *beta, const float *told, number *y,
                        float *mean, float *inverse, float *room, int64_t places, int64_t channels, int64_t groups,
                        float epsilon, int silu) {
    const int64_t width = channels / groups;
    float *from = room, *a = from + channels, *b = a + channels, *scale = b + channels, *shift = scale + channels;
    typical(x, from, places, channels);
    sums(x, from, a, b, places, channels);
    for (int64_t g = 0; g < groups; g++) {
        double sum = 0, squares = 0;
        for (int64_t c = g * width; c < (g + 1) * width; c++) sum += from[c] + (double)a[c] / places;
        sum /= width;
        /* The mean square of x - mean = (x - from) - (mean - from). */
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            double away = sum - from[c];
            squares += b[c] - 2 * away * a[c] + away * away * places;
        }
        mean[g] = (float)sum;
        inverse[g] = (float)(1 / sqrt(fmax(squares / (width * places), 0) + epsilon));
    }
    entered(gamma, beta, told, scale, shift, channels);
    for (int64_t c = 0; c < channels; c++) {
        a[c] = inverse[c / width] * scale[c];
        b[c] = shift[c] - mean[c / width] * a[c];
    }
    if (silu) apply(x, a, b, y, places, channels, 1);
    else apply(x, a, b, y, places, channels, 0);
}

/* The sum over the channels of group g. */
static double sum_of(const float *values, int64_t g, int64_t width) {
    double sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; c++) sum += values[c];
    return sum;
}

/* One picture, from dy; dgamma and dbeta are by what it entered with. `room` is for 6 + places times its channels. */
static void backward_one(const number *x, const float *gamma, const float *beta, const float *told, const float *mean,
                         const float *inverse, const number *dy, number *dx, float *dgamma, float *dbeta, float *room,
                         int64_t places, int64_t channels, int64_t groups, int silu) {
    const int64_t width = channels / groups;
    const double count = (double)(width * places);
    float *middle = room, *a = middle + channels, *b = a + channels;
    float *first = b + channels, *second = first + channels, *scale = second + channels, *dh = scale + channels;
    entered(gamma, beta, told, scale, b, channels);
    for (int64_t c = 0; c < channels; c++) {
        middle[c] = mean[c / width];
        a[c] = inverse[c / width] * scale[c];
    }
    if (silu) slopes(x, dy, middle, a, b, dh, dbeta, dgamma, places, channels, 1);
    else slopes(x, dy, middle, a, b, dh, dbeta, dgamma, places, channels, 0);
    for (int64_t c = 0; c < channels; c++) {
        dgamma[c] *= inverse[c / width];
        first[c] = scale[c] * dbeta[c];
        second[c] = scale[c] * dgamma[c];
    }
    /* dx = inverse (gamma dh - mean of first - (x - mean) inverse mean of second), the means over the whole group. */
    for (int64_t g = 0; g < groups; g++) {
        double of_first = sum_of(first, g, width) / count, of_second = sum_of(second, g, width) / count;
        for (int64_t c = g * width; c < (g + 1) * width; c++) {
            first[c] = (float)(-inverse[g] * of_first);
            second[c] = (float)(-inverse[g] * inverse[g] * of_second);
        }
    }
    back(x, dh, middle, a, first, second, dx, places, channels);
}

/* All pictures of a batch; mean and inverse come out, (batch, groups). `told` may be NULL. Not 0 if there was no
   memory. */
FOR_ANSWERS int forward(const number *x, const float *gamma, const float *beta, const float *told, number *y,
                        float *mean, float *inverse, int64_t batch, int64_t places, int64_t channels, int64_t groups,
                        float epsilon, int silu) {
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        float *room = malloc(5 * channels * sizeof(float));
        failed = room == NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch; n++)
            if (!failed)
                forward_one(x + n * places * channels, gamma, beta, told ? told + n * 2 * channels : NULL,
                            y + n * places * channels, mean + n * groups, inverse + n * groups, room, places, channels,
                            groups, epsilon, silu);
        free(room);
    }
    return failed;
}

/* All pictures of a batch; dx, dgamma and dbeta (channels), and dtold (batch, 2, channels) if it was told something,
   come out. Not 0 if there was no memory. */
FOR_GRADIENTS int backward(const number *x, const float *gamma, const float *beta, const float *told, const float *mean,
                           const float *inverse, const number *dy, number *dx, float *dgamma, float *dbeta,
                           float *dtold, int64_t batch, int64_t places, int64_t channels, int64_t groups, int silu) {
    float *each = malloc(batch * 2 * channels * sizeof(float));
    int failed = each == NULL;
#pragma omp parallel reduction(| : failed)
    {
        float *room = malloc((6 + places) * channels * sizeof(float));
        failed |= room == NULL || each == NULL;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < batch; n++)
            if (!failed)
                backward_one(x + n * places * channels, gamma, beta, told ? told + n * 2 * channels : NULL,
                             mean + n * groups, inverse + n * groups, dy + n * places * channels,
                             dx + n * places * channels, each + n * 2 * channels, each + (n * 2 + 1) * channels, room,
                             places, channels, groups, silu);
        free(room);
    }
    if (!failed) {
        memset(dgamma, 0, channels * sizeof(float)), memset(dbeta, 0, channels * sizeof(float));
        for (int64_t n = 0; n < batch; n++) {
            const float *by_gamma = each + n * 2 * channels, *by_beta = by_gamma + channels;
            for (int64_t c = 0; c < channels; c++) {
                const float scale = told ? 1 + told[n * 2 * channels + c] : 1;
                dgamma[c] += by_gamma[c] * scale;
                dbeta[c] += by_beta[c] * scale;
                if (told) {
                    dtold[n * 2 * channels + c] = by_gamma[c] * gamma[c] + by_beta[c] * beta[c];
                    dtold[(n * 2 + 1) * channels + c] = by_beta[c];
                }
            }
        }
    }
    free(each);
    return failed;
}
