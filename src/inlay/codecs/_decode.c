/* Rows of quantised weights as float32, straight into the place where they are wanted.
 *
 * Each function is the formula of its codec (`decode` there) with the same operations in the same order, every one
 * rounded once, so the bytes are those of the numpy path. Compiled with -ffp-contract=off: a fused multiply-add would
 * round once where the formats round twice.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))
#ifdef _MSC_VER
#undef INLINE
#define INLINE static __forceinline
#endif

typedef union { uint32_t u; float f; } word;

/* ---- sixteen values and a scale for each run of `block` of them: bitsandbytes nf4 and fp4, the high half first */

INLINE float one_value(const uint8_t *codes, const float *table, Py_ssize_t place) {
  return table[place & 1 ? codes[place >> 1] & 15 : codes[place >> 1] >> 4];
}

/* Values [skip, skip + count) of the codes; `within` is how far the first of them is inside its block. */
static void sixteen(const uint8_t *codes, Py_ssize_t skip, Py_ssize_t count, const float *table, const float *scales,
                    Py_ssize_t within, Py_ssize_t block, float *out) {
  float pair[256][2];
  for (int byte = 0; byte < 256; byte++) pair[byte][0] = table[byte >> 4], pair[byte][1] = table[byte & 15];
  for (Py_ssize_t at = 0; at < count; scales++) {
    const Py_ssize_t left = count - at, n = block - within < left ? block - within : left, end = at + n;
    const float scale = *scales;
    within = 0;
    if ((skip + at) & 1) out[at] = one_value(codes, table, skip + at) * scale, at++;
    const uint8_t *byte = codes + ((skip + at) >> 1);
    for (; at + 1 < end; at += 2, byte++) out[at] = pair[*byte][0] * scale, out[at + 1] = pair[*byte][1] * scale;
    if (at < end) out[at] = one_value(codes, table, skip + at) * scale, at++;
  }
}

/* absmax of nested blocks: the product is rounded, then the sum. */
CLONES static void nested(const uint8_t *codes, Py_ssize_t count, const float *map, const float *absmax,
                          Py_ssize_t within, Py_ssize_t block, float offset, float *out) {
  for (Py_ssize_t at = 0; at < count; absmax++, within = 0) {
    const Py_ssize_t left = count - at, n = block - within < left ? block - within : left;
    for (Py_ssize_t i = 0; i < n; i++) out[at + i] = map[codes[at + i]] * *absmax + offset;
    at += n;
  }
}

/* ---- words of 4-bit codes, low bits first, groups of columns: GPTQ (words of a row lie in a column) and others */

#define TURNED 16 /* rows and words turned at once: a cache line of words */

INLINE void eight_codes(uint32_t codes, int32_t zero, float scale, float *out) {
  for (int k = 0; k < 8; k++) out[k] = (float)((int32_t)(codes >> 4 * k & 15) - zero) * scale;
}

/* Words of one row, columns [begin, end), as (code - zero) * scale; `begin` begins a word. */
INLINE void row_of_words(const uint32_t *words, Py_ssize_t begin, Py_ssize_t end, const uint8_t *zeros,
                         const float *scales, Py_ssize_t size, float *out) {
  for (Py_ssize_t at = begin; at < end;) {
    const Py_ssize_t group = at / size, stop = (group + 1) * size < end ? (group + 1) * size : end;
    const int32_t zero = zeros[group];
    const float scale = scales[group];
    for (; at % 8 && at < stop; at++)
      out[at] = (float)((int32_t)(words[(at - begin) / 8] >> 4 * (at % 8) & 15) - zero) * scale;
    const uint32_t *word_ = words + (at - begin) / 8;
    for (; at + 8 <= stop; at += 8, word_++) eight_codes(*word_, zero, scale, out + at);
    for (; at < stop; at++) out[at] = (float)((int32_t)(words[(at - begin) / 8] >> 4 * (at % 8) & 15) - zero) * scale;
  }
}

/* Word j of row i is words[i + j * stride]; zeros and scales are (rows, groups). */
CLONES static void columns_of_words(const uint32_t *words, Py_ssize_t stride, Py_ssize_t rows, Py_ssize_t columns,
                                    const uint8_t *zeros, const float *scales, Py_ssize_t groups, Py_ssize_t size,
                                    float *out) {
  const Py_ssize_t count = (columns + 7) / 8;
  uint32_t turned[TURNED][TURNED];
  for (Py_ssize_t i0 = 0; i0 < rows; i0 += TURNED) {
    const Py_ssize_t n = rows - i0 < TURNED ? rows - i0 : TURNED;
    for (Py_ssize_t j0 = 0; j0 < count; j0 += TURNED) {
      const Py_ssize_t m = count - j0 < TURNED ? count - j0 : TURNED;
      const Py_ssize_t end = (j0 + m) * 8 < columns ? (j0 + m) * 8 : columns;
      for (Py_ssize_t j = 0; j < m; j++)
        for (Py_ssize_t i = 0; i < n; i++) turned[i][j] = words[i0 + i + (j0 + j) * stride];
      for (Py_ssize_t i = 0; i < n; i++)
        row_of_words(turned[i], j0 * 8, end, zeros + (i0 + i) * groups, scales + (i0 + i) * groups, size,
                     out + (i0 + i) * columns);
    }
  }
}

/* ---- F8_E4M3 with a scale for each `size` columns of a row */

INLINE float from_e4m3(uint8_t code) {
  const uint32_t magnitude = code & 0x7f;
  const word subnormal = {.f = (float)(int32_t)magnitude * 0x1p-9f};
  const uint32_t small = -(uint32_t)(magnitude < 8), nan = -(uint32_t)(magnitude == 0x7f); /* a branch costs more */
  const uint32_t bits = (subnormal.u & small) | (((magnitude << 20) + (120u << 23)) & ~small);
  word v = {.u = (bits & ~nan) | (nan & 0x7fc00000u) | (uint32_t)(code & 0x80) << 24};
  return v.f;
}

INLINE void run_of_e4m3(const uint8_t *restrict codes, Py_ssize_t n, float scale, float *restrict out) {
  for (Py_ssize_t j = 0; j < n; j++) out[j] = from_e4m3(codes[j]) * scale;
}

/* `between` is the distance of the scales of a row from those of the next, 0 where all rows have the same. */
CLONES static void e4m3(const uint8_t *codes, Py_ssize_t rows, Py_ssize_t columns, const float *scales,
                        Py_ssize_t between, Py_ssize_t size, float *out) {
  for (Py_ssize_t i = 0; i < rows; i++, scales += between)
    for (Py_ssize_t j0 = 0; j0 < columns; j0 += size) {
      const Py_ssize_t n = columns - j0 < size ? columns - j0 : size;
      run_of_e4m3(codes, n, scales[j0 / size], out);
      codes += n, out += n;
    }
}

/* ---- MXFP4: (out, groups, 16) bytes and (out, groups) exponents, as rows of (groups * 32, out) */

#define GROUP 32
#define WIDE 64 /* columns turned at once */

/* Twice the magnitudes 0 1/2 1 3/2 2 3 4 6, one in each half byte. */
INLINE float twice_e2m1(uint32_t code) {
  word v = {.f = (float)(int32_t)(0xC8643210u >> 4 * (code & 7) & 15)};
  v.u |= (code & 8) << 28;
  return v.f;
}

INLINE float half_power(uint8_t code) { /* 2^(code - 128), subnormal for code 0 and 1; NaN for 255 */
  word v = {.u = code == 255 ? 0x7fc00000u : code < 2 ? 0x200000u << code : (uint32_t)(code - 1) << 23};
  return v.f;
}

/* Rows [first, last), columns [0, count): `blocks` and `scales` of consecutive columns are `groups` groups apart. */
CLONES static void mxfp4(const uint8_t *blocks, const uint8_t *scales, Py_ssize_t groups, Py_ssize_t count,
                         Py_ssize_t first, Py_ssize_t last, float *out) {
  uint8_t turned[GROUP / 2][WIDE];
  float half[WIDE];
  for (Py_ssize_t g = first / GROUP; g * GROUP < last; g++)
    for (Py_ssize_t j0 = 0; j0 < count; j0 += WIDE) {
      const Py_ssize_t n = count - j0 < WIDE ? count - j0 : WIDE;
      for (Py_ssize_t j = 0; j < n; j++) {
        const Py_ssize_t at = (j0 + j) * groups + g;
        half[j] = half_power(scales[at]);
        for (int b = 0; b < GROUP / 2; b++) turned[b][j] = blocks[at * (GROUP / 2) + b];
      }
      for (int i = 0; i < GROUP; i++) {
        const Py_ssize_t row = g * GROUP + i;
        if (row < first || row >= last) continue;
        float *to = out + (row - first) * count + j0;
        const uint8_t *from = turned[i / 2];
        const int shift = i % 2 * 4;
        for (Py_ssize_t j = 0; j < n; j++) to[j] = twice_e2m1(from[j] >> shift) * half[j];
      }
    }
}

#define POINTER(x) ((void *)(uintptr_t)(x))

static PyObject *py_sixteen(PyObject *self, PyObject *args) {
  unsigned long long codes, table, scales, out;
  Py_ssize_t skip, count, within, block;
  if (!PyArg_ParseTuple(args, "KnnKKnnK", &codes, &skip, &count, &table, &scales, &within, &block, &out)) return NULL;
  Py_BEGIN_ALLOW_THREADS
  sixteen(POINTER(codes), skip, count, POINTER(table), POINTER(scales), within, block, POINTER(out));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_nested(PyObject *self, PyObject *args) {
  unsigned long long codes, map, absmax, out;
  Py_ssize_t count, within, block;
  float offset;
  if (!PyArg_ParseTuple(args, "KnKKnnfK", &codes, &count, &map, &absmax, &within, &block, &offset, &out)) return NULL;
  Py_BEGIN_ALLOW_THREADS
  nested(POINTER(codes), count, POINTER(map), POINTER(absmax), within, block, offset, POINTER(out));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_words(PyObject *self, PyObject *args) {
  unsigned long long words, zeros, scales, out;
  Py_ssize_t stride, rows, columns, groups, size;
  if (!PyArg_ParseTuple(args, "KnnnKKnnK", &words, &stride, &rows, &columns, &zeros, &scales, &groups, &size, &out))
    return NULL;
  Py_BEGIN_ALLOW_THREADS
  columns_of_words(POINTER(words), stride, rows, columns, POINTER(zeros), POINTER(scales), groups, size, POINTER(out));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_e4m3(PyObject *self, PyObject *args) {
  unsigned long long codes, scales, out;
  Py_ssize_t rows, columns, between, size;
  if (!PyArg_ParseTuple(args, "KnnKnnK", &codes, &rows, &columns, &scales, &between, &size, &out)) return NULL;
  Py_BEGIN_ALLOW_THREADS
  e4m3(POINTER(codes), rows, columns, POINTER(scales), between, size, POINTER(out));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyObject *py_mxfp4(PyObject *self, PyObject *args) {
  unsigned long long blocks, scales, out;
  Py_ssize_t groups, count, first, last;
  if (!PyArg_ParseTuple(args, "KKnnnnK", &blocks, &scales, &groups, &count, &first, &last, &out)) return NULL;
  Py_BEGIN_ALLOW_THREADS
  mxfp4(POINTER(blocks), POINTER(scales), groups, count, first, last, POINTER(out));
  Py_END_ALLOW_THREADS
  Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"sixteen", py_sixteen, METH_VARARGS, "sixteen(codes, skip, count, table, scales, within, block, out)"},
    {"nested", py_nested, METH_VARARGS, "nested(codes, count, map, absmax, within, block, offset, out)"},
    {"words", py_words, METH_VARARGS, "words(words, stride, rows, columns, zeros, scales, groups, size, out)"},
    {"e4m3", py_e4m3, METH_VARARGS, "e4m3(codes, rows, columns, scales, between, size, out)"},
    {"mxfp4", py_mxfp4, METH_VARARGS, "mxfp4(blocks, scales, groups, count, first, last, out)"},
    {NULL, NULL, 0, NULL}};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_decode", "Addresses of contiguous arrays.", 0, methods,
                                    NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__decode(void) { return PyModule_Create(&module); }
