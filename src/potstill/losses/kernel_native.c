/* Loss kernel for float32 rows on a CPU: see fused_chunks.py and kernel_native.py.

   A row of logits is read twice: once for both normalisers, once for the loss and its slope; the slope is read once more
   for the gradient. Blocks of a row stay in the L1 cache between the steps on them. GCC and Clang compile the vectors
   below to the widest that the processor has. kernel_native.py writes POINTWISE from Divergence.pointwise. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX512F__) /* a longer vector than the processor's would be split into single numbers */
#define LANES 16
#elif defined(__AVX2__)
#define LANES 8
#else
#define LANES 4
#endif
#define BLOCK (16 * LANES) /* elements summed in float32; the blocks are summed in double */
#define LOG_ZERO -1e37f

typedef float vf __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t vi __attribute__((vector_size(4 * LANES), aligned(4)));
#define INLINE static inline __attribute__((always_inline))

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf op_where(vi mask, vf a, vf b) { return (vf)(((vi)a & mask) | ((vi)b & ~mask)); }
INLINE vf op_maximum(vf a, vf b) { return op_where(a > b, a, b); }
INLINE vf op_minimum(vf a, vf b) { return op_where(a < b, a, b); }
INLINE vf op_abs(vf x) { return (vf)((vi)x & 0x7fffffff); }
INLINE vf op_sign(vf x) { return op_where(x > 0.0f, splat(1.0f), op_where(x < 0.0f, splat(-1.0f), x)); }
INLINE vf op_reciprocal(vf x) { return 1.0f / x; }
INLINE vf op_sqrt(vf x) {
    for (int k = 0; k < LANES; k++) x[k] = sqrtf(x[k]);
    return x;
}

/* e^x = 2^n * e^r with |r| <= ln 2 / 2; the polynomial is the minimax one of Cephes, under 2 units in the last place. Subnormal
   results are 0. For x < 88. */
INLINE vf exponential_below_88(vf x) {
    vf n = x * 1.44269504f + 12582912.0f - 12582912.0f;
    vf r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vf p = 1.9875691500e-4f * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * (r * r) + r) + 1.0f;
    vi power = (__builtin_convertvector(n, vi) + 127) << 23; /* wrong for x < -87, and not used there */
    return op_where(x < -87.33f, splat(0.0f), p * (vf)power);
}
INLINE vf op_exp(vf x) {
    vf result = exponential_below_88(op_minimum(x, splat(88.0f)));
    return op_where(x == x, op_where(x > 88.0f, splat(INFINITY), result), x);
}

/* log(1 + x) for 0 <= x <= 1, as 2 artanh(x / (2 + x)). */
INLINE vf log_one_plus(vf x) {
    vf s = x / (x + 2.0f), y = s * s;
    vf p = y * (1.0f / 13) + 1.0f / 11;
    p = p * y + 1.0f / 9;
    p = p * y + 1.0f / 7;
    p = p * y + 1.0f / 5;
    p = p * y + 1.0f / 3;
    return 2.0f * (s + s * y * p);
}
INLINE vf op_logaddexp(vf a, vf b) { return op_maximum(a, b) + log_one_plus(exponential_below_88(-op_abs(a - b))); }

/* x = 2^n * m with m in [2/3, 4/3), log m = 2 artanh((m - 1) / (m + 1)). */
INLINE vf op_log(vf x) {
    vi bits = (vi)x - 0x3f2aaaab;
    vf n = __builtin_convertvector(bits >> 23, vf);
    vf m = (vf)((bits & 0x007fffff) + 0x3f2aaaab);
    vf s = (m - 1.0f) / (m + 1.0f), y = s * s;
    vf p = y * (1.0f / 11) + 1.0f / 9;
    p = p * y + 1.0f / 7;
    p = p * y + 1.0f / 5;
    p = p * y + 1.0f / 3;
    vf result = 2.0f * (s + s * y * p) + n * -2.12194440e-4f + n * 0.693359375f;
    result = op_where(x > 1.17e-38f, result, op_where(x < 0.0f, splat(NAN), splat(-INFINITY)));
    return op_where((x == x) & (x < INFINITY), result, x);
}
INLINE vf op_log1p(vf x) { /* Goldberg's correction for what 1 + x rounds away */
    vf u = x + 1.0f, exact = op_log(u) * (x / (u - 1.0f));
    return op_where(u == 1.0f, x, op_where(op_abs(x) < INFINITY, exact, op_log(u)));
}
INLINE vf op_expm1(vf x) {
    vf p = x * (1.0f / 40320) + 1.0f / 5040;
    p = p * x + 1.0f / 720;
    p = p * x + 1.0f / 120;
    p = p * x + 1.0f / 24;
    p = p * x + 1.0f / 6;
    p = p * x + 0.5f;
    return op_where(op_abs(x) < 0.5f, p * x * x + x, op_exp(x) - 1.0f);
}

INLINE void pointwise(vf log_q, vf log_p, vf *value, vf *slope) {
    POINTWISE
}

/* Rows have room behind V for a full last vector; it is filled with LOG_ZERO. */
INLINE vf load(const float *at) { return *(const vf *)at; }
INLINE void store(float *at, vf x) { *(vf *)at = x; }
INLINE void fill(float *row, long V) {
    for (long v = V; v % LANES; v++) row[v] = LOG_ZERO;
}
INLINE vi inside(long v, long V) { /* lanes before V */
    vi lane;
    for (int k = 0; k < LANES; k++) lane[k] = k;
    return lane < (int32_t)(V - v < LANES ? V - v : LANES);
}
INLINE float sum(vf x) {
    float total = 0;
    for (int k = 0; k < LANES; k++) total += x[k];
    return total;
}

/* A row's largest z / T and the sum of exp(z / T - largest): LOG_ZERO and 1 where every token is ruled out. */
typedef struct { float top; double total; } sums;

static sums softmax_sums(const float *row, long V, float inverse) {
    float top = LOG_ZERO;
    double total = 0;
    for (long start = 0; start < V; start += BLOCK) {
        long end = start + BLOCK < V ? start + BLOCK : V;
        vf most = splat(LOG_ZERO), part = {0};
        vi unordered = {0};
        for (long v = start; v < end; v += LANES) {
            vf z = load(row + v);
            unordered |= z != z;
            most = op_maximum(z * inverse, most);
        }
        float block_top = top;
        for (int k = 0; k < LANES; k++) {
            if (most[k] > block_top) block_top = most[k];
            if (unordered[k]) return (sums){NAN, NAN};
        }
        if (block_top > top) {
            total *= exp((double)top - block_top);
            top = block_top;
        }
        for (long v = start; v < end; v += LANES)
            part += exponential_below_88(op_maximum(load(row + v) * inverse, splat(LOG_ZERO)) - top);
        total += top > LOG_ZERO ? sum(part) : 0;
    }
    return top > LOG_ZERO ? (sums){top, total} : (sums){LOG_ZERO, 1};
}

/* log softmax(z / T)_v = (max(z_v / T, LOG_ZERO) - top) - log_total; LOG_ZERO in a row where every token is ruled out */
typedef struct { float inverse, top, log_total; } normaliser;

INLINE float base(sums row) { return row.top == LOG_ZERO ? 0 : row.top; }
INLINE vf log_softmax(vf z, normaliser n) { return (op_maximum(z * n.inverse, splat(LOG_ZERO)) - n.top) - n.log_total; }

static normaliser normalise(const float *row, long V, float inverse) {
    sums s = softmax_sums(row, V, inverse);
    return (normaliser){inverse, base(s), (float)log(s.total)};
}

/* Rows of one chunk, `stride` apart. student becomes the gradient if scale is not NULL; teacher is overwritten and may
   be NULL; labels may be NULL, and are below 0 where ignored. */
void loss_and_gradient(float *student, float *teacher, const float *scale, const int64_t *labels, float *divergence,
                       float *cross_entropy, long rows, long V, long stride, float temperature, float label_weight) {
    for (long row = 0; row < rows; row++) {
        float *z = student + row * stride, *p = teacher ? teacher + row * stride : 0;
        fill(z, V);
        if (p) fill(p, V);
        normaliser soft = {0}, hard = {0};
        double value_total = 0, slope_total = 0;
        if (p) {
            soft = normalise(z, V, 1 / temperature);
            normaliser teacher_soft = normalise(p, V, 1 / temperature);
            for (long start = 0; start < V; start += BLOCK) {
                vf values = {0}, slopes = {0};
                for (long v = start; v < V && v < start + BLOCK; v += LANES) {
                    vf value, slope;
                    pointwise(log_softmax(load(z + v), soft), log_softmax(load(p + v), teacher_soft),
                              &value, &slope);
                    values += (vf)((vi)value & inside(v, V));
                    slopes += (vf)((vi)slope & inside(v, V));
                    if (scale) store(p + v, slope);
                }
                value_total += sum(values);
                slope_total += sum(slopes);
            }
            divergence[row] = (float)value_total;
        }
        int is_target = labels && labels[row] >= 0;
        if (labels) {
            hard = p && temperature == 1 ? soft : normalise(z, V, 1);
            float label_logit = is_target ? z[labels[row]] : 0;
            label_logit = label_logit > LOG_ZERO || label_logit != label_logit ? label_logit : LOG_ZERO;
            cross_entropy[row] = is_target ? hard.log_total - (label_logit - hard.top) : 0;
        }
        if (!scale) continue;

        float slope_scale = p ? scale[row] / temperature : 0, label_scale = is_target ? scale[row] * label_weight : 0;
        float total = (float)slope_total, rest = (float)(slope_total - total); /* slope - q * total cancels */
        for (long v = 0; v < V; v += LANES) {
            vf logits = load(z + v), gradient = {0}, q = {0};
            if (p) {
                q = exponential_below_88(log_softmax(logits, soft));
                gradient = ((load(p + v) - q * total) - q * rest) * slope_scale;
            }
            if (is_target) gradient += (p && temperature == 1 ? q : exponential_below_88(log_softmax(logits, hard))) * label_scale;
            store(z + v, gradient);
        }
        if (is_target) z[labels[row]] -= label_scale;
    }
}

/* Rows of logits become exp(z - top), with their largest logit and their sum. */
void exponentials(float *logits, float *tops, float *totals, long rows, long V, long stride) {
    for (long row = 0; row < rows; row++) {
        float *z = logits + row * stride;
        fill(z, V);
        sums s = softmax_sums(z, V, 1);
        for (long v = 0; v < V; v += LANES)
            store(z + v, exponential_below_88(op_maximum(load(z + v), splat(LOG_ZERO)) - base(s)));
        tops[row] = s.top;
        totals[row] = (float)s.total;
    }
}
