// What a decoding step does between its matrix products, for texts of one new token each. Products are torch's.
//
// Numbers are rounded where the forward pass that trains rounds them, so that both are one policy. T is what keys, values
// and the inputs of products are kept in: float, or bfloat16 as the upper half of one. No exp of the C library: it is
// not the same everywhere, and compilers make no vectors of it.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

struct bf16 {
    uint16_t bits;
};

static inline float wide(float x) { return x; }
static inline float wide(bf16 x) {
    uint32_t bits = uint32_t(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

template <typename T> static inline T narrow(float x);
template <> inline float narrow<float>(float x) { return x; }
template <> inline bf16 narrow<bf16>(float x) {  // to the nearest, ties to even; what is not a number stays none
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded)};
}

// e^x to two units in the last place: x = n ln 2 + r, a polynomial in r, and n into the exponent.
static inline float exponential(float x) {
    x = std::min(std::max(x, -87.3f), 88.3f);
    float n = std::nearbyintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    int32_t power = (int32_t(n) + 127) << 23;
    float scale;
    std::memcpy(&scale, &power, 4);
    return p * scale;
}

// Attention of the queries that share a head of keys: q [groups, dim] to out [groups, dim], over `count` columns.
// DIM: dim where it is known beforehand, so that the sums stay in registers; 0 otherwise.
template <typename T, int DIM>
static void attend_one(const float *__restrict q, const T *__restrict keys, const T *__restrict values, int64_t count,
                       int64_t groups, int64_t dims, float scaling, float *__restrict scores, float *__restrict sums,
                       T *__restrict out) {
    const int64_t dim = DIM ? DIM : dims;
    for (int64_t j = 0; j < count; j++) {
        const T *__restrict key = keys + j * dim;
        for (int64_t g = 0; g < groups; g++) {
            const float *__restrict own = q + g * dim;
            float sum = 0;
            for (int64_t d = 0; d < dim; d++) sum += own[d] * wide(key[d]);
            scores[g * count + j] = sum * scaling;
        }
    }
    for (int64_t g = 0; g < groups; g++) {
        float *__restrict of = scores + g * count, *__restrict sum = sums + g * dim;
        float highest = of[0], total = 0;
        for (int64_t j = 1; j < count; j++) highest = std::max(highest, of[j]);
        for (int64_t j = 0; j < count; j++) of[j] = exponential(of[j] - highest);
        for (int64_t j = 0; j < count; j++) total += of[j];
        for (int64_t d = 0; d < dim; d++) sum[d] = 0;
        for (int64_t j = 0; j < count; j++) {
            const T *__restrict value = values + j * dim;
            const float weight = wide(narrow<T>(of[j] / total));
            for (int64_t d = 0; d < dim; d++) sum[d] += weight * wide(value[d]);
        }
        for (int64_t d = 0; d < dim; d++) out[g * dim + d] = narrow<T>(sum[d]);
    }
}

template <typename T>
static void attend(const float *q, const T *keys, const T *values, int64_t count, int64_t groups, int64_t dim,
                   float scaling, float *scores, float *sums, T *out) {
    auto usual = dim == 64 ? attend_one<T, 64> : dim == 128 ? attend_one<T, 128> : attend_one<T, 0>;
    usual(q, keys, values, count, groups, dim, scaling, scores, sums, out);
}

// The first `half` numbers of a head and those after them, turned by an angle each (rotary embeddings).
template <typename T, typename U>
static void turned(const T *__restrict head, const float *__restrict cosine, const float *__restrict sine, int64_t dim,
                   U *__restrict out, bool narrowed) {
    const int64_t half = dim / 2;
    for (int64_t d = 0; d < half; d++) {
        const float a = wide(head[d]), b = wide(head[d + half]);
        const float x = a * cosine[d] - b * sine[d], y = b * cosine[d + half] + a * sine[d + half];
        out[d] = narrow<U>(narrowed ? wide(narrow<T>(x)) : x);
        out[d + half] = narrow<U>(narrowed ? wide(narrow<T>(y)) : y);
    }
}

// One new token of each text: its key is turned and kept with its value, its queries are turned and attend.
// query, key, value: rows of heads of `dim` numbers, `*_stride` apart. cosine, sine: [texts, dim], none to turn nothing.
// keys, values: [slots, kv_heads, room, dim]. lengths: [texts] before this token. out: [texts, heads * dim].
template <typename T>
static void decode(const T *query, int64_t query_stride, const T *key, int64_t key_stride, const T *value,
                   int64_t value_stride, const float *cosine, const float *sine, T *keys, T *values,
                   const int64_t *lengths, T *out, int64_t texts, int64_t heads, int64_t kv_heads, int64_t dim,
                   int64_t room, int64_t window, float scaling) {
    const int64_t groups = heads / kv_heads;
    const int64_t longest = *std::max_element(lengths, lengths + texts) + 1;
#pragma omp parallel
    {
        std::vector<float> q(groups * dim), sums(groups * dim), scores(groups * longest);
#pragma omp for collapse(2) schedule(static)
        for (int64_t text = 0; text < texts; text++)
            for (int64_t head = 0; head < kv_heads; head++) {
                const int64_t pool = (text * kv_heads + head) * room * dim, length = lengths[text];
                const T *own = query + text * query_stride + head * groups * dim, *k = key + text * key_stride + head * dim;
                T *kept = keys + pool + length * dim;
                if (cosine) {
                    const float *c = cosine + text * dim, *s = sine + text * dim;
                    turned(k, c, s, dim, kept, false);
                    for (int64_t g = 0; g < groups; g++) turned(own + g * dim, c, s, dim, q.data() + g * dim, true);
                } else {
                    std::memcpy(kept, k, dim * sizeof(T));
                    for (int64_t d = 0; d < groups * dim; d++) q[d] = wide(own[d]);
                }
                std::memcpy(values + pool + length * dim, value + text * value_stride + head * dim, dim * sizeof(T));
                const int64_t from = window > 0 ? std::max<int64_t>(0, length + 1 - window) : 0;
                attend(q.data(), keys + pool + from * dim, values + pool + from * dim, length + 1 - from, groups, dim,
                       scaling, scores.data(), sums.data(), out + (text * heads + head * groups) * dim);
            }
    }
}

// Each row over its root mean square, times the weight.
template <typename T>
static void norm(const float *x, const float *weight, float epsilon, T *out, int64_t rows, int64_t dim) {
#pragma omp parallel for schedule(static) if (rows * dim > 8192)
    for (int64_t r = 0; r < rows; r++) {
        const float *of = x + r * dim;
        float squares = 0;
        for (int64_t d = 0; d < dim; d++) squares += of[d] * of[d];
        const float factor = 1.0f / std::sqrt(squares / dim + epsilon);
        for (int64_t d = 0; d < dim; d++) out[r * dim + d] = narrow<T>(weight[d] * (of[d] * factor));
    }
}

// SiLU of the gates, times what they let through; both [rows, size], rows `*_stride` apart.
template <typename T>
static void gate(const T *gates, int64_t gates_stride, const T *through, int64_t through_stride, T *out, int64_t rows,
                 int64_t size) {
#pragma omp parallel for schedule(static) if (rows * size > 8192)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t d = 0; d < size; d++) {
            const float x = wide(gates[r * gates_stride + d]);
            const float open = wide(narrow<T>(x / (1.0f + exponential(-x))));
            out[r * size + d] = narrow<T>(open * wide(through[r * through_stride + d]));
        }
}

#define EXPORT(T)                                                                                                      \
    extern "C" void decode_##T(const T *q, int64_t qs, const T *k, int64_t ks, const T *v, int64_t vs, const float *c, \
                               const float *s, T *keys, T *values, const int64_t *lengths, T *out, int64_t texts,      \
                               int64_t heads, int64_t kv_heads, int64_t dim, int64_t room, int64_t window,             \
                               float scaling) {                                                                        \
        decode(q, qs, k, ks, v, vs, c, s, keys, values, lengths, out, texts, heads, kv_heads, dim, room, window,       \
               scaling);                                                                                               \
    }                                                                                                                  \
    extern "C" void norm_##T(const float *x, const float *weight, float epsilon, T *out, int64_t rows, int64_t dim) {  \
        norm(x, weight, epsilon, out, rows, dim);                                                                      \
    }                                                                                                                  \
    extern "C" void gate_##T(const T *gates, int64_t gs, const T *through, int64_t ts, T *out, int64_t rows,           \
                             int64_t size) {                                                                           \
        gate(gates, gs, through, ts, out, rows, size);                                                                 \
    }

EXPORT(float)
EXPORT(bf16)
