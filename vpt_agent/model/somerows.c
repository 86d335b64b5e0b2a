/* One token each of some rows: what lies between their products, and products in float32; see
 * somerows.py. The routines for one row stand in onerow.c, whose vectors these use, too.
 *
 * What stands "in columns" is [n, R]: R rows of the batch side by side, padded to a multiple of 16.
 */
#include "onerow.c"

#define BLOCK 16 /* columns that are computed together */
#define TALL 8       /* rows of a weight that are computed together */
#define FURTHER 8192 /* floats by which weights are asked for before they are needed, */
#define NEAR 32      /* and asked for once more, into the nearest cache */
#define UNROLL _Pragma("GCC unroll 16") /* sums stay in registers */

/* ROWS rows of a weight [m, n] times columns x [n, R]: 16 * WIDE columns of y from here on. */
#define TILE(NAME, ROWS, WIDE)                                                                     \
  INLINE void NAME(const float *w, const float *bias, const float *x, float *y, int64_t n,         \
                   int64_t R, int added) {                                                         \
    v16 a[ROWS][WIDE] = {};                                                                        \
    const float *next = w + FURTHER;                                                               \
    int64_t k = 0;                                                                                 \
    for (; k + BLOCK <= n; k += BLOCK) {                                                           \
      UNROLL for (int64_t i = 0; i < ROWS; i++) {                                                  \
        __builtin_prefetch(next + k * ROWS + i * BLOCK, 0, 2);                                     \
        __builtin_prefetch(w + i * n + k + NEAR, 0, 3);                                            \
      }                                                                                            \
      for (int64_t s = 0; s < BLOCK; s++) {                                                        \
        v16 b[WIDE];                                                                               \
        UNROLL for (int64_t v = 0; v < WIDE; v++) b[v] = load(x, (k + s) * R + v * BLOCK, 0);      \
        UNROLL for (int64_t i = 0; i < ROWS; i++)                                                  \
          UNROLL for (int64_t v = 0; v < WIDE; v++) a[i][v] += w[i * n + k + s] * b[v];            \
      }                                                                                            \
    }                                                                                              \
    UNROLL for (int64_t i = 0; i < ROWS; i++)                                                      \
      UNROLL for (int64_t v = 0; v < WIDE; v++) {                                                  \
        float *to = y + i * R + v * BLOCK;                                                         \
        if (bias) a[i][v] += bias[i];                                                              \
        keep(to, added ? load(to, 0, 0) + a[i][v] : a[i][v]);                                      \
      }                                                                                            \
  }
TILE(tile_tall_1, TALL, 1)
TILE(tile_1_1, 1, 1)
TILE(tile_tall_2, TALL, 2)
TILE(tile_1_2, 1, 2)

#define ALL(WIDE)                                                                                  \
  for (i = 0; i + TALL <= m; i += TALL)                                                                  \
    tile_tall_##WIDE(w + i * n, bias ? bias + i : 0, x + c, y + i * R + c, n, R, added);       \
  for (; i < m; i++)                                                                               \
    tile_1_##WIDE(w + i * n, bias ? bias + i : 0, x + c, y + i * R + c, n, R, added);

/* y [m, R] = weight [m, n] times x [n, R], plus bias [m] (none: NULL), plus y if added. */
void vpt_columns(const float *w, const float *bias, const float *x, float *y, int64_t m, int64_t n,
                 int64_t R, int64_t added) {
  int64_t i, c = 0;
  for (; c + 2 * BLOCK <= R; c += 2 * BLOCK) {
    ALL(2)
  }
  for (; c < R; c += BLOCK) {
    ALL(1)
  }
}

INLINE void columns_normed(const void *x, const void *weight, void *y, int64_t n, int64_t R,
                           float eps, int half) {
  for (int64_t c = 0; c < R; c += BLOCK) {
    v16 squares = {}, scale = {};
    for (int64_t i = 0; i < n; i++) {
      v16 here = load(x, i * R + c, half);
      squares += here * here;
    }
    for (int64_t v = 0; v < BLOCK; v++) scale[v] = 1.0f / sqrtf(squares[v] / (float)n + eps);
    for (int64_t i = 0; i < n; i++) {
      v16 here = load(x, i * R + c, half) * scale * one(weight, i, half);
      if (half)
        for (int64_t v = 0; v < BLOCK; v++) put(y, i * R + c + v, here[v], 1);
      else
        keep((float *)y + i * R + c, here);
    }
  }
}

/* y [n, R] = RMS norm of the columns of x [n, R], times weight [n]. */
void vpt_columns_norm(const void *x, const void *weight, void *y, int64_t n, int64_t R, double eps,
                      int64_t half) {
  if (half)
    columns_normed(x, weight, y, n, R, (float)eps, 1);
  else
    columns_normed(x, weight, y, n, R, (float)eps, 0);
}

/* As attend of one row, G known: sums stay in registers. scores: G * (count rounded up to 16). */
#define MOST 8
#define SOON 8 /* slots by which keys are asked for before they are needed */
INLINE void attend_some(const float *q, const void *keys, const void *values, int64_t head,
                        int64_t kv, int64_t G, int64_t d, const int64_t *seen, int64_t count,
                        float *scores, float *out, int half) {
  const float scale = 1.0f / sqrtf((float)d);
  const int64_t wide = (count + 15) / 16 * 16;
  float inverse[MOST];
  const int64_t size = half ? 2 : 4;
  for (int64_t s = 0; s < count; s++) {
    int64_t at = (seen[s] * kv + head) * d;
    int64_t later = (seen[s + SOON < count ? s + SOON : s] * kv + head) * d;
    v16 a[MOST] = {};
    for (int64_t i = 0; i * 64 < d * size; i++) {
      __builtin_prefetch((const char *)keys + later * size + 64 * i);
      __builtin_prefetch((const char *)values + at * size + 64 * i);
    }
    for (int64_t i = 0; i < d; i += 16) {
      v16 here = load(keys, at + i, half);
      for (int64_t g = 0; g < G; g++) a[g] += here * load(q, g * d + i, 0);
    }
    for (int64_t g = 0; g < G; g++) scores[g * wide + s] = scale * sum(a[g]);
  }
  for (int64_t g = 0; g < G; g++) {
    float *own = scores + g * wide, most, all = 0;
    for (int64_t s = count; s < wide; s++) own[s] = own[0];
    v16 top = load(own, 0, 0), total = {};
    for (int64_t s = 16; s < wide; s += 16) {
      v16 here = load(own, s, 0);
      i16 larger = here > top, old, new;
      memcpy(&old, &top, sizeof old);
      memcpy(&new, &here, sizeof new);
      new = (new & larger) | (old & ~larger);
      memcpy(&top, &new, sizeof top);
    }
    most = top[0];
    for (int64_t v = 1; v < 16; v++) most = top[v] > most ? top[v] : most;
    for (int64_t s = 0; s < wide; s += 16) {
      v16 here = exponential(load(own, s, 0) - most);
      keep(own + s, here);
      total += here;
    }
    for (int64_t s = count; s < wide; s++) all += own[s]; /* what only fills the last vector */
    inverse[g] = 1.0f / (sum(total) - all);
  }
  for (int64_t i = 0; i < d; i += 16) {
    v16 a[MOST] = {};
    for (int64_t s = 0; s < count; s++) {
      v16 here = load(values, (seen[s] * kv + head) * d + i, half);
      for (int64_t g = 0; g < G; g++) a[g] += here * scores[g * wide + s];
    }
    for (int64_t g = 0; g < G; g++) keep(out + g * d + i, a[g] * inverse[g]);
  }
}

enum { ROWS, PADDED, SHAPE_HEADS, SHAPE_KV, SHAPE_HEAD, SEEN };

INLINE void rows_attend(const int64_t *shape, const void *made, const float *cosines,
                        const float *sines, void *keys, void *values, const int64_t *slots,
                        const int64_t *seen, const int64_t *counts, void *out, float *room,
                        int half) {
  const int64_t R = shape[PADDED], H = shape[SHAPE_HEADS], kv = shape[SHAPE_KV];
  const int64_t d = shape[SHAPE_HEAD], G = H / kv, all = (H + 2 * kv) * d;
  float *row = room, *one_out = row + all, *scores = one_out + H * d;
  for (int64_t r = 0; r < shape[ROWS]; r++) {
    for (int64_t i = 0; i < all; i++) row[i] = one(made, i * R + r, half);
    turn(row, cosines + r * (d / 2), sines + r * (d / 2), H + kv, d);
    for (int64_t i = 0; i < kv * d; i++) {
      put(keys, slots[r] * kv * d + i, row[H * d + i], half);
      put(values, slots[r] * kv * d + i, row[(H + kv) * d + i], half);
    }
    for (int64_t h = 0; h < kv; h++) {
      const float *q = row + h * G * d;
      const int64_t *own = seen + r * shape[SEEN];
      float *to = one_out + h * G * d;
      if (G == 4)
        attend_some(q, keys, values, h, kv, 4, d, own, counts[r], scores, to, half);
      else if (G <= MOST)
        attend_some(q, keys, values, h, kv, G, d, own, counts[r], scores, to, half);
      else
        attend(q, keys, values, h, kv, G, d, own, 0, counts[r], scores, to, half);
    }
    for (int64_t i = 0; i < H * d; i++) put(out, i * R + r, one_out[i], half);
  }
}

/* Behind the products of a layer: made [(H + 2 K) * d, R] are queries, keys and values of each row
 * in columns. Turns them by cosines and sines [rows, d / 2], writes keys and values to slots [rows]
 * of the cache, and attends to seen [rows, SEEN], of which counts [rows] are real, the new one
 * included. out [H * d, R] in columns. room: (2 H + 2 K) * d + H / K * (SEEN rounded up to 16). */
void vpt_rows_attend(const int64_t *shape, const void *made, const float *cosines,
                     const float *sines, void *keys, void *values, const int64_t *slots,
                     const int64_t *seen, const int64_t *counts, void *out, float *room,
                     int64_t half) {
  if (half)
    rows_attend(shape, made, cosines, sines, keys, values, slots, seen, counts, out, room, 1);
  else
    rows_attend(shape, made, cosines, sines, keys, values, slots, seen, counts, out, room, 0);
}
