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

#ifdef BF16
typedef uint16_t number;

static inline float read(number value) {
    uint32_t bits = (uint32_t)value << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

/* The nearest, of two as near the even one. A NaN stays one: its first bits are kept, and a quiet one's are not 0. */
static inline number write(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return (number)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}
#else
typedef float number;

static inline float read(number value) { return value; }
static inline number write(float value) { return value; }
#endif

/* 1 / (1 + exp(-h)) to some 2e-7: exp as 2^whole times a polynomial, which compilers make vectors of. */
static inline float sigmoid(float h) {
    float scaled = h * -1.44269504f;
    scaled = scaled > 126.0f ? 126.0f : scaled;
    scaled = scaled < -126.0f ? -126.0f : scaled;
    /* Adding and taking away 1.5 2^23 rounds to a whole number. */
    float whole = (scaled + 12582912.0f) - 12582912.0f;
    float rest = (scaled - whole) * 0.693147181f;
    float power = 1.38888889e-3f;
    power = power * rest + 8.33333333e-3f;
    power = power * rest + 4.16666667e-2f;
    power = power * rest + 1.66666667e-1f;
    power = power * rest + 0.5f;
    power = power * rest + 1;
    power = power * rest + 1;
    int32_t bits = ((int32_t)whole + 127) << 23;
    float exponent;
    memcpy(&exponent, &bits, 4);
    return 1 / (1 + power * exponent);
}

/* The sum over the channels of group g. */
static double sum_of(const float *values, int64_t g, int64_t width) {
    double sum = 0;
    for (int64_t c = g * width; c < (g + 1) * width; c++) sum += values[c];
    return sum;
}

/* One picture; mean and inverse, 1 / sqrt(variance + epsilon), are of its groups. a and b have room for its channels. */
static void forward_one(const number *restrict x, const float *restrict gamma, const float *restrict beta,
                        number *restrict y, float *restrict mean, float *restrict inverse, float *restrict a,
                        float *restrict b, int64_t places, int64_t channels, int64_t groups, float epsilon, int silu) {
    const int64_t width = channels / groups;
    const double count = (double)(width * places);
    for (int64_t c = 0; c < channels; c++) a[c] = 0;
    for (int64_t p = 0; p < places; p++)
        for (int64_t c = 0; c < channels; c++) a[c] += read(x[p * channels + c]);
    for (int64_t g = 0; g < groups; g++) mean[g] = (float)(sum_of(a, g, width) / count);
    for (int64_t c = 0; c < channels; c++) a[c] = mean[c / width], b[c] = 0;
    for (int64_t p = 0; p < places; p++)
        for (int64_t c = 0; c < channels; c++) {
            float away = read(x[p * channels + c]) - a[c];
            b[c] += away * away;
        }
    for (int64_t g = 0; g < groups; g++) inverse[g] = (float)(1 / sqrt(sum_of(b, g, width) / count + epsilon));
    for (int64_t c = 0; c < channels; c++) {
        a[c] = inverse[c / width] * gamma[c];
        b[c] = beta[c] - mean[c / width] * a[c];
    }
    for (int64_t p = 0; p < places; p++)
        if (silu)
            for (int64_t c = 0; c < channels; c++) {
                float h = read(x[p * channels + c]) * a[c] + b[c];
                y[p * channels + c] = write(h * sigmoid(h));
            }
        else
            for (int64_t c = 0; c < channels; c++) y[p * channels + c] = write(read(x[p * channels + c]) * a[c] + b[c]);
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
        dbeta[c] = 0, dgamma[c] = 0;
    }
    for (int64_t p = 0; p < places; p++)
        for (int64_t c = 0; c < channels; c++) {
            float away = read(x[p * channels + c]) - middle[c];
            float h = away * a[c] + b[c];
            float share = silu ? sigmoid(h) : 1;
            float d = read(dy[p * channels + c]) * (silu ? share * (1 + h * (1 - share)) : 1);
            dh[p * channels + c] = d;
            dbeta[c] += d;
            dgamma[c] += d * away;
        }
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
    for (int64_t p = 0; p < places; p++)
        for (int64_t c = 0; c < channels; c++) {
            float away = read(x[p * channels + c]) - middle[c];
            dx[p * channels + c] = write(dh[p * channels + c] * a[c] + away * second[c] + first[c]);
        }
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
