/* One token of one row through all layers of a language model, in one call; see compiled.py.
 *
 * Weights are float32 or bfloat16 and stream through the caches once; everything between them is
 * float32. Vectors of 16 floats are the compiler's own (gcc, clang): it makes of them what the
 * processor has. Widths must be multiples of 16.
 *
 * D width, H heads, K key-value heads, d head width, I inner width, S slots that are seen.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define AHEAD 4096 /* bytes by which weights are asked for before they are needed */

typedef float v16 __attribute__((vector_size(64)));
typedef float v8 __attribute__((vector_size(32)));
typedef float v4 __attribute__((vector_size(16)));
typedef int32_t i16 __attribute__((vector_size(64)));
typedef uint32_t u16 __attribute__((vector_size(64)));
typedef uint16_t h16 __attribute__((vector_size(32)));

INLINE v16 load(const void *base, int64_t i, int half) {
  v16 out;
  if (half) {
    h16 raw;
    memcpy(&raw, (const uint16_t *)base + i, sizeof raw);
    u16 wide = __builtin_convertvector(raw, u16) << 16;
    memcpy(&out, &wide, sizeof out);
  } else {
    memcpy(&out, (const float *)base + i, sizeof out);
  }
  return out;
}

INLINE void keep(float *to, v16 x) { memcpy(to, &x, sizeof x); }

INLINE float one(const void *base, int64_t i, int half) {
  float out;
  if (!half) return ((const float *)base)[i];
  uint32_t bits = (uint32_t)((const uint16_t *)base)[i] << 16;
  memcpy(&out, &bits, sizeof out);
  return out;
}

INLINE void put(void *base, int64_t i, float x, int half) {
  if (!half) {
    ((float *)base)[i] = x;
    return;
  }
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  /* To the nearest, ties to even; what is no number stays none. */
  ((uint16_t *)base)[i] = x != x ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

INLINE float sum(v16 x) {
  v8 a, b;
  v4 c, d;
  memcpy(&a, &x, sizeof a);
  memcpy(&b, (char *)&x + sizeof a, sizeof b);
  a += b;
  memcpy(&c, &a, sizeof c);
  memcpy(&d, (char *)&a + sizeof c, sizeof d);
  c += d;
  return (c[0] + c[1]) + (c[2] + c[3]);
}

/* e to the x, to some 1e-7 of its value: 2 to a whole number, times a polynomial (Remez). */
INLINE v16 exponential(v16 x) {
  const v16 low = (v16){} - 87.0f, high = (v16){} + 88.0f;
  i16 under = x < low, over = x > high;
  v16 inside;
  i16 bits, lows, highs;
  memcpy(&bits, &x, sizeof bits);
  memcpy(&lows, &low, sizeof lows);
  memcpy(&highs, &high, sizeof highs);
  bits = (bits & ~under & ~over) | (lows & under) | (highs & over);
  memcpy(&inside, &bits, sizeof inside);
  v16 shifted = inside * 1.44269504f + 12582912.0f; /* rounds to a whole number */
  v16 whole = shifted - 12582912.0f;
  v16 rest = inside - whole * 0.693359375f + whole * 2.12194440e-4f;
  v16 p = (v16){} + 1.9875691500e-4f;
  p = p * rest + 1.3981999507e-3f;
  p = p * rest + 8.3334519073e-3f;
  p = p * rest + 4.1665795894e-2f;
  p = p * rest + 1.6666665459e-1f;
  p = p * rest + 5.0000001201e-1f;
  p = p * rest * rest + rest + 1.0f;
  i16 power = (__builtin_convertvector(whole, i16) + 127) << 23;
  v16 scale;
  memcpy(&scale, &power, sizeof scale);
  return p * scale;
}

/* y [m] = scale * (weight [m, n] times x [n]) + bias [m] (none: NULL), plus what y is if added. */
INLINE void product(const void *weight, const void *bias, const float *x, float scale, float *y,
                    int64_t m, int64_t n, int added, int half) {
  const int64_t size = half ? 2 : 4;
  for (int64_t i = 0; i < m; i++) {
    const char *row = (const char *)weight + i * n * size;
    v16 a = {}, b = {}, c = {}, e = {};
    int64_t j = 0;
    for (; j + 64 <= n; j += 64) {
      for (int64_t line = 0; line < size; line++)
        __builtin_prefetch(row + j * size + AHEAD + 64 * line);
      a += load(row, j, half) * load(x, j, 0);
      b += load(row, j + 16, half) * load(x, j + 16, 0);
      c += load(row, j + 32, half) * load(x, j + 32, 0);
      e += load(row, j + 48, half) * load(x, j + 48, 0);
    }
    for (; j < n; j += 16) a += load(row, j, half) * load(x, j, 0);
    float made = scale * sum((a + b) + (c + e));
    if (bias) made += one(bias, i, half);
    y[i] = added ? y[i] + made : made;
  }
}

/* x [n] times a norm's weight; returns the scale that is still to be multiplied in. */
INLINE float normed(const float *x, const void *weight, float *out, int64_t n, float eps,
                    int half) {
  v16 squares = {};
  for (int64_t i = 0; i < n; i += 16) {
    v16 here = load(x, i, 0);
    squares += here * here;
    keep(out + i, here * load(weight, i, half));
  }
  return 1.0f / sqrtf(sum(squares) / (float)n + eps);
}

/* Queries and keys [heads, d] turned by their position. */
INLINE void turn(float *x, const float *cosines, const float *sines, int64_t heads, int64_t d) {
  for (int64_t h = 0; h < heads; h++, x += d)
    for (int64_t i = 0; i < d / 2; i++) {
      float a = x[i], b = x[i + d / 2];
      x[i] = a * cosines[i] - b * sines[i];
      x[i + d / 2] = b * cosines[i] + a * sines[i];
    }
}

/* out [G, d] of one key-value head: G queries q [G, d] over the slots that are seen. */
INLINE void attend(const float *q, const void *keys, const void *values, int64_t head, int64_t kv,
                   int64_t groups, int64_t d, const int64_t *seen, int64_t first, int64_t count,
                   float *scores, float *out, int half) {
  const float scale = 1.0f / sqrtf((float)d);
  const int64_t wide = (count + 15) / 16 * 16;
  for (int64_t s = 0; s < count; s++) {
    int64_t at = ((seen ? seen[s] : first + s) * kv + head) * d;
    for (int64_t g = 0; g < groups; g++) {
      v16 a = {};
      for (int64_t i = 0; i < d; i += 16) a += load(keys, at + i, half) * load(q, g * d + i, 0);
      scores[g * wide + s] = scale * sum(a);
    }
  }
  for (int64_t g = 0; g < groups; g++) {
    float *own = scores + g * wide, most = own[0], total = 0;
    for (int64_t s = 1; s < count; s++) most = own[s] > most ? own[s] : most;
    for (int64_t s = count; s < wide; s++) own[s] = -INFINITY;
    for (int64_t s = 0; s < wide; s += 16) keep(own + s, exponential(load(own, s, 0) - most));
    for (int64_t s = 0; s < count; s++) total += own[s];
    for (int64_t s = 0; s < count; s++) own[s] /= total;
  }
  memset(out, 0, sizeof(float) * groups * d);
  for (int64_t s = 0; s < count; s++) {
    int64_t at = ((seen ? seen[s] : first + s) * kv + head) * d;
    for (int64_t i = 0; i < d; i += 16) {
      v16 here = load(values, at + i, half);
      for (int64_t g = 0; g < groups; g++)
        keep(out + g * d + i, load(out, g * d + i, 0) + here * scores[g * wide + s]);
    }
  }
}

enum { LAYERS, WIDTH, HEADS, KV, HEAD, INNER, SLOT, FIRST, COUNT };
enum { Q, K, V, QB, KB, VB, O, GATE, UP, DOWN, BEFORE, BETWEEN, KEYS, VALUES, PARTS };

INLINE void pass(const int64_t *shape, const void *const *parts, const int64_t *seen,
                 const float *speed, const double *numbers, const void *last, const void *embed,
                 void *out, float *room, int half) {
  const int64_t D = shape[WIDTH], H = shape[HEADS], kv = shape[KV], d = shape[HEAD];
  const int64_t I = shape[INNER], groups = H / kv, slot = shape[SLOT];
  const float position = (float)numbers[0], scaling = (float)numbers[1], eps = (float)numbers[2];
  float *x = room, *row = x + D, *q = row + D, *k = q + H * d, *v = k + kv * d;
  float *seenout = v + kv * d, *gate = seenout + H * d, *up = gate + I;
  float *cosines = up + I, *sines = cosines + d / 2, *scores = sines + d / 2;
  for (int64_t i = 0; i < d / 2; i++) {
    cosines[i] = cosf(position * speed[i]) * scaling;
    sines[i] = sinf(position * speed[i]) * scaling;
  }
  for (int64_t i = 0; i < D; i += 16) keep(x + i, load(embed, i, half));
  for (int64_t l = 0; l < shape[LAYERS]; l++, parts += PARTS) {
    float scale = normed(x, parts[BEFORE], row, D, eps, half);
    product(parts[Q], parts[QB], row, scale, q, H * d, D, 0, half);
    product(parts[K], parts[KB], row, scale, k, kv * d, D, 0, half);
    product(parts[V], parts[VB], row, scale, v, kv * d, D, 0, half);
    turn(q, cosines, sines, H + kv, d); /* keys lie behind the queries */
    for (int64_t i = 0; i < kv * d; i++) {
      put((void *)parts[KEYS], slot * kv * d + i, k[i], half);
      put((void *)parts[VALUES], slot * kv * d + i, v[i], half);
    }
    for (int64_t h = 0; h < kv; h++)
      attend(q + h * groups * d, parts[KEYS], parts[VALUES], h, kv, groups, d, seen, shape[FIRST],
             shape[COUNT], scores, seenout + h * groups * d, half);
    product(parts[O], 0, seenout, 1.0f, x, D, H * d, 1, half);
    scale = normed(x, parts[BETWEEN], row, D, eps, half);
    product(parts[GATE], 0, row, scale, gate, I, D, 0, half);
    product(parts[UP], 0, row, scale, up, I, D, 0, half);
    for (int64_t i = 0; i < I; i += 16) {
      v16 here = load(gate, i, 0);
      keep(gate + i, here / (exponential(-here) + 1.0f) * load(up, i, 0));
    }
    product(parts[DOWN], 0, gate, 1.0f, x, D, I, 1, half);
  }
  float scale = normed(x, last, row, D, eps, half);
  for (int64_t i = 0; i < D; i++) put(out, i, row[i] * scale, half);
}

void vpt_one_row(const int64_t *shape, const void *const *parts, const int64_t *seen,
                 const float *speed, const double *numbers, const void *last, const void *embed,
                 void *out, float *room, int64_t half) {
  if (half)
    pass(shape, parts, seen, speed, numbers, last, embed, out, room, 1);
  else
    pass(shape, parts, seen, speed, numbers, last, embed, out, room, 0);
}

/* y [m] float32 = weight [m, n] times x [n], weight and x of one type. room: n floats. */
void vpt_times(const void *weight, const void *x, float *y, int64_t m, int64_t n, float *room,
               int64_t half) {
  if (half) {
    for (int64_t i = 0; i < n; i += 16) keep(room + i, load(x, i, 1));
    product(weight, 0, room, 1.0f, y, m, n, 0, 1);
  } else {
    product(weight, 0, x, 1.0f, y, m, n, 0, 0);
  }
}
