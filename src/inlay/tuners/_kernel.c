/* One tile of an additive merge, correctly rounded:  out = round(w + sum_k c_k l_ik r_kj)
 *
 * A row block of the weight is visited once. Each element goes through at most two tiers here:
 *
 *   1. float32 with an error bound. |computed - exact| <= e, where
 *          e = n u |c l_i| |r_j| + 4 u |v| + tiny,     u = 2^-24, n = 16 + rank / 16 + 6,
 *      from the usual bound of a dot product (Higham 2002, section 3.1) and Cauchy-Schwarz for
 *      sum |c l r| <= |c l_i| |r_j|. When v - e and v + e round to the same stored value, that
 *      value is the rounding of the exact one, whatever order the sums were taken in.
 *   2. float64 with the same bound and u = 2^-53, for the few that tier 1 leaves open.
 *
 * A float32 result has no use for tier 1: all its elements go through tier 2.
 *
 * What is still open is listed for the caller, who decides it with exact arithmetic. So neither
 * the vector width nor the compiler nor the tile size can change a byte of the result.
 *
 * Layout: w, out row-major (rows, cols); l row-major (rows, rank) float32; r packed by pack() into
 * strips of STRIP columns, [strip][rank][STRIP], which the product reads from end to end. A panel of
 * PANEL columns, a few strips, stays in the first cache while the rows pass under it.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define PANEL 64
#define LANES 8
#define STRIP (2 * LANES)
#define ROWS 6
#define PIECE 16
#define NEUTRAL -1.0f
#define WILD -2.0f

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BF16 = 0, F16 = 1, F32 = 2 };

typedef union { uint32_t u; float f; } word;
typedef float vector __attribute__((vector_size(LANES * sizeof(float))));
typedef int64_t wide_bits __attribute__((vector_size(LANES * sizeof(int64_t))));
typedef double wide __attribute__((vector_size(LANES * sizeof(double))));

INLINE float from_bf16(uint16_t h) { word v = {.u = (uint32_t)h << 16}; return v.f; }

INLINE float from_f16(uint16_t h) {
  const word magic = {.u = 113u << 23};
  word v = {.u = (uint32_t)(h & 0x7fff) << 13};
  uint32_t exponent = v.u & (0x7c00u << 13);
  word subnormal = {.u = v.u + ((127u - 15u + 1u) << 23)};
  subnormal.f -= magic.f;
  v.u += (127u - 15u) << 23;
  v.u = exponent == (0x7c00u << 13) ? v.u + ((128u - 16u) << 23) : v.u;
  v.u = exponent == 0 ? subnormal.u : v.u;
  v.u |= (uint32_t)(h & 0x8000) << 16;
  return v.f;
}

/* Nearest, ties to even. The addition would carry a NaN whose last bits are set over to zero; only a
 * float32 weight can be one, so only those are looked at. */
INLINE uint16_t to_bf16(float f, int any_nan) {
  word v = {.f = f};
  uint32_t rounded = (v.u + 0x7fffu + ((v.u >> 16) & 1u)) >> 16;
  return (uint16_t)(any_nan && (v.u & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

INLINE uint16_t to_f16(float f) {
  const word denormal = {.u = ((127u - 15u) + (23u - 10u) + 1u) << 23};
  word v = {.f = f};
  uint32_t sign = v.u & 0x80000000u;
  v.u ^= sign;
  word small = v;
  small.f += denormal.f;
  uint32_t subnormal = small.u - denormal.u;
  uint32_t normal = (v.u + ((uint32_t)(15 - 127) << 23) + 0xfffu + ((v.u >> 13) & 1u)) >> 13;
  uint32_t special = v.u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  uint32_t h = v.u < (113u << 23) ? subnormal : normal;
  h = v.u >= (143u << 23) ? special : h;
  return (uint16_t)(h | (sign >> 16));
}

INLINE float load(const void *w, int kind, Py_ssize_t i) {
  return kind == BF16  ? from_bf16(((const uint16_t *)w)[i])
         : kind == F16 ? from_f16(((const uint16_t *)w)[i])
                       : ((const float *)w)[i];
}

INLINE uint16_t round_to(float f, int w_kind, int out_kind) {
  return out_kind == BF16 ? to_bf16(f, w_kind == F32) : to_f16(f);
}

/* Like round_to but for ties, which go away from zero: cheaper, and the same for the ends of an interval that
 * agree, since no tie lies between them. */
INLINE uint32_t round_end(float f, int w_kind, int out_kind) {
  word v = {.f = f};
  return out_kind == BF16 && w_kind != F32 ? (v.u + 0x8000u) >> 16 : round_to(f, w_kind, out_kind);
}

/* From double without rounding twice: to float by rounding to odd, then once to the target. */
static uint16_t round_double(double x, int kind) {
  word v = {.f = (float)x};
  double error = x - (double)v.f;
  if (error != 0 && isfinite(v.f) && !(v.u & 1u))
    v.u += ((error > 0) == !(v.u >> 31)) ? 1 : -1;
  return round_to(v.f, F32, kind);
}

typedef struct {
  const void *w;
  uint16_t *out;
  int w_kind, out_kind;
  Py_ssize_t rows, cols, rank;
  const float *l, *packed, *column_norm;
  const double *scale; /* one per rank component: each adapter's own */
  float *scaled;       /* (rows rounded up to ROWS, rank): c_k l_ik in float32 */
  double *scaled_wide; /* the same in float64, for a float32 result */
  float *row_bound;    /* (rows,); NEUTRAL for a row without factor, WILD for one that float32 cannot hold */
  double *row_norm;    /* (rows,): |c l_i|, rounded up */
  double largest_norm; /* of a column of r */
  int64_t *open_list;
  Py_ssize_t open_capacity, open_count, nonfinite; /* nonfinite: 0 or 1 */
} tile;

static void decide_in_double(tile *t, Py_ssize_t i, Py_ssize_t j) {
  const float *strip = t->packed + (j / STRIP) * t->rank * STRIP + j % STRIP;
  const float *l = t->l + i * t->rank;
  double sum[4] = {0};
  for (Py_ssize_t k = 0; k < t->rank; k++) /* four chains hide the latency of an addition */
    sum[k & 3] += t->scale[k] * l[k] * (double)strip[k * STRIP];
  double v = load(t->w, t->w_kind, i * t->cols + j) + ((sum[0] + sum[1]) + (sum[2] + sum[3]));
  double e = 1.01 * (t->rank + 5) * 0x1p-53 * t->row_norm[i] * t->column_norm[j] + 0x1p-51 * fabs(v) + 0x1p-1060;
  uint16_t low = round_double(v - e, t->out_kind), high = round_double(v + e, t->out_kind);
  t->out[i * t->cols + j] = low;
  t->nonfinite |= (low & 0x7fff) >= (t->out_kind == BF16 ? 0x7f80 : 0x7c00);
  if (!isfinite(load(t->w, t->w_kind, i * t->cols + j))) t->out[i * t->cols + j] = 0x7fff;
  else if (low != high || !isfinite(v)) {
    if (t->open_count < t->open_capacity) t->open_list[t->open_count] = i * t->cols + j;
    t->open_count++;
  }
}

INLINE void store(float *at, vector x, int add) {
  if (add) {
    vector so_far;
    memcpy(&so_far, at, sizeof so_far);
    x += so_far;
  }
  memcpy(at, &x, sizeof x);
}

/* sum (+)= scaled (ROWS, depth) times a piece of a strip, in registers: the twelve accumulators are
 * written out, because compilers keep an array of them in memory. */
INLINE void multiply_piece(const float *a, const float *strip, Py_ssize_t rank, Py_ssize_t depth, int add,
                           float *sum) {
  const float *b = a + rank, *c = b + rank, *d = c + rank, *e = d + rank, *f = e + rank;
  vector a0 = {0}, a1 = {0}, b0 = {0}, b1 = {0}, c0 = {0}, c1 = {0};
  vector d0 = {0}, d1 = {0}, e0 = {0}, e1 = {0}, f0 = {0}, f1 = {0};
  for (Py_ssize_t k = 0; k < depth; k++, strip += STRIP) {
    vector x, y;
    memcpy(&x, strip, sizeof x);
    memcpy(&y, strip + LANES, sizeof y);
    a0 += a[k] * x, a1 += a[k] * y;
    b0 += b[k] * x, b1 += b[k] * y;
    c0 += c[k] * x, c1 += c[k] * y;
    d0 += d[k] * x, d1 += d[k] * y;
    e0 += e[k] * x, e1 += e[k] * y;
    f0 += f[k] * x, f1 += f[k] * y;
  }
  store(sum, a0, add), store(sum + LANES, a1, add), sum += PANEL;
  store(sum, b0, add), store(sum + LANES, b1, add), sum += PANEL;
  store(sum, c0, add), store(sum + LANES, c1, add), sum += PANEL;
  store(sum, d0, add), store(sum + LANES, d1, add), sum += PANEL;
  store(sum, e0, add), store(sum + LANES, e1, add), sum += PANEL;
  store(sum, f0, add), store(sum + LANES, f1, add);
}

/* Pieces of PIECE components keep the error bound short: each sum has at most
 * PIECE + rank / PIECE + 1 additions in a row. */
INLINE void multiply(const float *scaled, const float *panel, Py_ssize_t rank, float sum[ROWS][PANEL]) {
  for (int s = 0; s < PANEL; s += STRIP) {
    const float *strip = panel + s * rank;
    multiply_piece(scaled, strip, rank, rank < PIECE ? rank : PIECE, 0, sum[0] + s);
    for (Py_ssize_t k = PIECE; k < rank; k += PIECE)
      multiply_piece(scaled + k, strip + k * STRIP, rank, rank - k < PIECE ? rank - k : PIECE, 1, sum[0] + s);
  }
}

/* The ends of the interval that holds the exact result of column j, as stored values. */
INLINE void round_ends(float w, float sum, float norm, float bound, int w_kind, int out_kind, uint32_t *low,
                       uint32_t *high) {
  float v = w + sum;
  float e = bound * norm + 0x1p-140f + 0x1p-22f * fabsf(v);
  *low = round_end(v - e, w_kind, out_kind), *high = round_end(v + e, w_kind, out_kind);
}

INLINE void load_row(const tile *t, Py_ssize_t at, Py_ssize_t width, int kind, float *w) {
  const size_t nbytes = kind == F32 ? 4 : 2;
  const char *source = (const char *)t->w + at * nbytes;
  if (width == PANEL) {
    for (int j = 0; j < PANEL; j++) w[j] = load(source, kind, j);
    return;
  }
  uint32_t raw[PANEL] = {0};
  memcpy(raw, source, width * nbytes);
  for (int j = 0; j < PANEL; j++) w[j] = load(raw, kind, j);
}

/* The columns of a row that float32 leaves open; few rows have one, so they are looked for only then. */
INLINE void decide_open(tile *t, Py_ssize_t i, Py_ssize_t j0, Py_ssize_t width, const float *w, const float *sum,
                        int w_kind, int out_kind) {
  uint16_t differ[PANEL];
  for (int j = 0; j < PANEL; j++) {
    uint32_t a, b;
    round_ends(w[j], sum[j], t->column_norm[j0 + j], t->row_bound[i], w_kind, out_kind, &a, &b);
    differ[j] = (uint16_t)(a ^ b);
  }
  for (int j = 0; j < PANEL; j += 4) {
    uint64_t four;
    memcpy(&four, differ + j, sizeof four);
    for (int k = j; four && k < j + 4; k++)
      if (differ[k] && k < width) decide_in_double(t, i, j0 + k);
  }
}

INLINE void merge_row(tile *t, Py_ssize_t i, Py_ssize_t j0, Py_ssize_t width, const float *sum, int w_kind,
                      int out_kind) {
  const Py_ssize_t at = i * t->cols + j0;
  const float *norm = t->column_norm + j0;
  float w[PANEL];
  uint16_t low[PANEL];
  load_row(t, at, width, w_kind, w);
  if (t->row_bound[i] == WILD) {
    for (Py_ssize_t j = 0; j < width; j++) decide_in_double(t, i, j0 + j);
    return;
  }
  uint32_t open = 0;
  if (t->row_bound[i] == NEUTRAL) { /* a zero factor keeps the weights, the sign of zero too */
    for (int j = 0; j < PANEL; j++) low[j] = round_to(w[j], w_kind, out_kind);
  } else {
    for (int j = 0; j < PANEL; j++) {
      uint32_t a, b;
      round_ends(w[j], sum[j], norm[j], t->row_bound[i], w_kind, out_kind, &a, &b);
      low[j] = (uint16_t)a;
      open |= a ^ b;
    }
  }
  const uint16_t infinity = out_kind == BF16 ? 0x7f80 : 0x7c00;
  uint16_t bad = 0;
  for (int j = 0; j < PANEL; j++) bad |= (low[j] & 0x7fff) >= infinity;
  if (width == PANEL) memcpy(t->out + at, low, sizeof low);
  else memcpy(t->out + at, low, width * sizeof *low);
  t->nonfinite |= bad;
  if (open) decide_open(t, i, j0, width, w, sum, w_kind, out_kind);
}

INLINE void merge_kinds(tile *t, int w_kind, int out_kind) {
  const Py_ssize_t rank = t->rank, span = (rank <= 16 ? 4 : rank <= 32 ? 2 : 1) * PANEL;
  float sum[ROWS][PANEL];
  for (Py_ssize_t first = 0; first < t->cols; first += span) {
    const Py_ssize_t last = first + span < t->cols ? first + span : t->cols;
    for (Py_ssize_t i0 = 0; i0 < t->rows; i0 += ROWS) {
      const Py_ssize_t n = t->rows - i0 < ROWS ? t->rows - i0 : ROWS;
      for (Py_ssize_t j0 = first; j0 < last; j0 += PANEL) {
        const Py_ssize_t width = last - j0 < PANEL ? last - j0 : PANEL;
        if (rank) multiply(t->scaled + i0 * rank, t->packed + j0 * rank, rank, sum);
        for (Py_ssize_t i = 0; i < n; i++) merge_row(t, i0 + i, j0, width, sum[i], w_kind, out_kind);
      }
    }
  }
}

/* c_k l_ik in float32, the length of each row and its share of the error bound. */
static void scale_rows(tile *t) {
  const Py_ssize_t rank = t->rank;
  for (Py_ssize_t j = 0; j < (rank ? t->cols : 0); j++)
    if (t->column_norm[j] > t->largest_norm) t->largest_norm = t->column_norm[j];
  const double additions = (rank < PIECE ? rank : PIECE) + rank / PIECE + 6;
  for (Py_ssize_t i = 0; i < t->rows; i++) {
    double squares = 0;
    int live = 0, wild = 0;
    for (Py_ssize_t k = 0; k < rank; k++) {
      double c = t->scale[k] * (double)t->l[i * rank + k];
      t->scaled[i * rank + k] = (float)c;
      if (t->scaled_wide) t->scaled_wide[i * rank + k] = c;
      squares += c * c;
      if (t->scale[k] != 0 && t->l[i * rank + k] != 0) {
        live = 1;
        wild |= !(fabs(c) > 0x1p-100 && fabs(c) < 0x1p100);
      }
    }
    t->row_norm[i] = 1.0001 * sqrt(squares) + 0x1p-1000;
    wild |= t->row_norm[i] * t->largest_norm > 0x1p120;
    t->row_bound[i] = !live ? NEUTRAL : wild ? WILD : (float)(1.01 * additions * 0x1p-24 * t->row_norm[i]);
  }
}

/* ---- a float32 result: tier 2 at once, for all elements */

#define WIDE_ROWS 4

/* scaled_wide (WIDE_ROWS, rank) times LANES columns of a strip. */
INLINE void multiply_wide(const double *a, const float *strip, Py_ssize_t rank, double sum[WIDE_ROWS][LANES]) {
  const double *b = a + rank, *c = b + rank, *d = c + rank;
  wide s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0};
  for (Py_ssize_t k = 0; k < rank; k++, strip += STRIP) {
    vector narrow;
    memcpy(&narrow, strip, sizeof narrow);
    const wide x = __builtin_convertvector(narrow, wide);
    s0 += a[k] * x, s1 += b[k] * x, s2 += c[k] * x, s3 += d[k] * x;
  }
  memcpy(sum[0], &s0, sizeof s0), memcpy(sum[1], &s1, sizeof s1);
  memcpy(sum[2], &s2, sizeof s2), memcpy(sum[3], &s3, sizeof s3);
}

/* The ends of the interval that holds the exact result, rounded, and its middle. */
INLINE void wide_ends(const float *w, const double *sum, const float *norm, double bound, double *v, uint32_t *low,
                      uint32_t *high) {
  vector narrow, length;
  wide middle, size;
  memcpy(&narrow, w, sizeof narrow), memcpy(&length, norm, sizeof length), memcpy(&middle, sum, sizeof middle);
  middle += __builtin_convertvector(narrow, wide);
  size = (wide)((wide_bits)middle & 0x7fffffffffffffff);
  const wide e = bound * __builtin_convertvector(length, wide) + 0x1p-51 * size + 0x1p-1060;
  const vector below = __builtin_convertvector(middle - e, vector), above = __builtin_convertvector(middle + e, vector);
  memcpy(v, &middle, sizeof middle), memcpy(low, &below, sizeof below), memcpy(high, &above, sizeof above);
}

/* `width` columns of row i, from j0 on, of which LANES sums are given. */
INLINE void merge_wide_row(tile *t, Py_ssize_t i, Py_ssize_t j0, Py_ssize_t width, const double *sum, int w_kind) {
  const Py_ssize_t at = i * t->cols + j0;
  uint32_t raw[LANES] = {0}, low[LANES], high[LANES], open = 0, bad = 0;
  float w[LANES];
  double v[LANES];
  memcpy(raw, (const char *)t->w + at * (w_kind == F32 ? 4 : 2), width * (w_kind == F32 ? 4 : 2));
  for (int j = 0; j < LANES; j++) w[j] = load(raw, w_kind, j);
  if (t->row_bound[i] == NEUTRAL) { /* a zero factor keeps the weights, the sign of zero too */
    memcpy(low, w, sizeof low);
  } else {
    wide_ends(w, sum, t->column_norm + j0, 1.01 * (t->rank + 5) * 0x1p-53 * t->row_norm[i], v, low, high);
    for (int j = 0; j < LANES; j++) open |= low[j] ^ high[j];
  }
  for (int j = 0; j < LANES; j++) bad |= (low[j] & 0x7f800000u) == 0x7f800000u;
  if ((open || bad) && t->row_bound[i] != NEUTRAL)
    for (Py_ssize_t j = 0; j < width; j++) {
      if (!isfinite(w[j])) low[j] = 0x7fffffffu;
      else if (low[j] != high[j] || !isfinite(v[j])) {
        if (t->open_count < t->open_capacity) t->open_list[t->open_count] = at + j;
        t->open_count++;
      }
    }
  memcpy((float *)t->out + at, low, width * sizeof *low);
  t->nonfinite |= bad;
}

INLINE void merge_wide_kind(tile *t, int w_kind) {
  const Py_ssize_t rank = t->rank, span = (rank <= 16 ? 4 : rank <= 32 ? 2 : 1) * PANEL;
  double sum[WIDE_ROWS][LANES];
  for (Py_ssize_t first = 0; first < t->cols; first += span) {
    const Py_ssize_t last = first + span < t->cols ? first + span : t->cols;
    for (Py_ssize_t i0 = 0; i0 < t->rows; i0 += WIDE_ROWS) {
      const Py_ssize_t n = t->rows - i0 < WIDE_ROWS ? t->rows - i0 : WIDE_ROWS;
      for (Py_ssize_t j0 = first; j0 < last; j0 += LANES) {
        const Py_ssize_t width = last - j0 < LANES ? last - j0 : LANES;
        if (rank) multiply_wide(t->scaled_wide + i0 * rank, t->packed + j0 / STRIP * STRIP * rank + j0 % STRIP, rank, sum);
        for (Py_ssize_t i = 0; i < n; i++) merge_wide_row(t, i0 + i, j0, width, sum[i], w_kind);
      }
    }
  }
}

CLONES static void merge_wide(tile *t) {
  switch (t->w_kind) {
    case BF16: merge_wide_kind(t, BF16); break;
    case F16: merge_wide_kind(t, F16); break;
    case F32: merge_wide_kind(t, F32); break;
  }
}

CLONES static void merge_tile(tile *t) {
  switch (t->w_kind * 2 + t->out_kind) {
    case 0: merge_kinds(t, BF16, BF16); break;
    case 1: merge_kinds(t, BF16, F16); break;
    case 2: merge_kinds(t, F16, BF16); break;
    case 3: merge_kinds(t, F16, F16); break;
    case 4: merge_kinds(t, F32, BF16); break;
    case 5: merge_kinds(t, F32, F16); break;
  }
  if (!t->nonfinite) return; /* or only an end of an interval was beyond the largest value */
  const uint16_t infinity = t->out_kind == BF16 ? 0x7f80 : 0x7c00;
  uint16_t bad = 0;
  for (Py_ssize_t i = 0; i < t->rows * t->cols; i++) bad |= (t->out[i] & 0x7fff) >= infinity;
  t->nonfinite = bad;
}

CLONES static void pack_panels(const float *r, Py_ssize_t rank, Py_ssize_t cols, float *packed, float *norm) {
  const Py_ssize_t padded = (cols + PANEL - 1) / PANEL * PANEL;
  for (Py_ssize_t j0 = 0; j0 < padded; j0 += STRIP) {
    float *strip = packed + j0 * rank;
    double squares[STRIP] = {0};
    for (Py_ssize_t k = 0; k < rank; k++)
      for (Py_ssize_t j = 0; j < STRIP; j++) {
        float x = j0 + j < cols ? r[k * cols + j0 + j] : 0;
        strip[k * STRIP + j] = x;
        squares[j] += (double)x * x;
      }
    for (Py_ssize_t j = 0; j < STRIP; j++) norm[j0 + j] = (float)(1.0001 * sqrt(squares[j]) + 0x1p-120);
  }
}

#define POINTER(x) ((void *)(uintptr_t)(x))

static PyObject *py_pack(PyObject *self, PyObject *args) {
  unsigned long long r, packed, norm;
  Py_ssize_t rank, cols;
  if (!PyArg_ParseTuple(args, "KnnKK", &r, &rank, &cols, &packed, &norm)) return NULL;
  Py_BEGIN_ALLOW_THREADS
  pack_panels(POINTER(r), rank, cols, POINTER(packed), POINTER(norm));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_merge(PyObject *self, PyObject *args) {
  unsigned long long w, out, l, scale, packed, norm, open_list;
  tile t = {0};
  if (!PyArg_ParseTuple(args, "KiKinnnKKKKKn", &w, &t.w_kind, &out, &t.out_kind, &t.rows, &t.cols, &t.rank, &l,
                        &scale, &packed, &norm, &open_list, &t.open_capacity))
    return NULL;
  if (t.w_kind < 0 || t.w_kind > 2 || t.out_kind < 0 || t.out_kind > 2) {
    PyErr_SetString(PyExc_ValueError, "kinds: 0 bfloat16, 1 float16, 2 float32");
    return NULL;
  }
  t.w = POINTER(w), t.out = POINTER(out), t.l = POINTER(l), t.scale = POINTER(scale);
  t.packed = POINTER(packed), t.column_norm = POINTER(norm), t.open_list = POINTER(open_list);
  const size_t padded = (size_t)t.rows / ROWS * ROWS + 2 * ROWS; /* a multiple of ROWS and of WIDE_ROWS fits */
  t.scaled = calloc(padded * (t.rank ? t.rank : 1), sizeof *t.scaled);
  t.row_bound = malloc(padded * sizeof *t.row_bound);
  t.row_norm = malloc(padded * sizeof *t.row_norm);
  if (t.out_kind == F32) t.scaled_wide = calloc(padded * (t.rank ? t.rank : 1), sizeof *t.scaled_wide);
  const int allocated = t.scaled && t.row_bound && t.row_norm && (t.scaled_wide || t.out_kind != F32);
  if (allocated) {
    Py_BEGIN_ALLOW_THREADS
    scale_rows(&t);
    if (t.out_kind == F32) merge_wide(&t);
    else merge_tile(&t);
    Py_END_ALLOW_THREADS
  }
  free(t.scaled), free(t.scaled_wide), free(t.row_bound), free(t.row_norm);
  if (!allocated) return PyErr_NoMemory();
  return Py_BuildValue("nn", t.open_count, t.nonfinite);
}

static PyMethodDef methods[] = {
    {"pack", py_pack, METH_VARARGS, "pack(r, rank, cols, packed, column_norm): addresses of float32 arrays."},
    {"merge", py_merge, METH_VARARGS,
     "merge(w, w_kind, out, out_kind, rows, cols, rank, l, scale, packed, column_norm, open_list, capacity)"
     " -> (open, nonfinite)."},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_kernel", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) {
  PyObject *m = PyModule_Create(&module);
  if (m && PyModule_AddIntConstant(m, "PANEL", PANEL) < 0) return NULL;
  return m;
}
