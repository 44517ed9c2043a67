/* Sum weights by block, as `torch_block_sums` in distribution.py; compiled by compiled.py.
 *
 * The operations are those of the PyTorch code, in the same order, so that results are equal in
 * every bit: torch.exp2 is Sleef's exp2f (u10), torch.add is a fused multiply-add, and torch.sum of
 * 64 numbers adds vectors of 8 numbers, then the 8 lanes one after the other.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, LANES = 8 };
static const float PEAK = 8, NOTHING = -1000, LOWEST = -125;

static inline float as_float(int32_t bits) {
  float number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

static inline int32_t as_bits(float number) {
  int32_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits;
}

/* 2 ** x for |x| <= 0.5 */
static inline float exp2_fraction(float x) {
  float p = 0.1535920892e-3f;
  p = fmaf(p, x, 0.1339262701e-2f);
  p = fmaf(p, x, 0.9618384764e-2f);
  p = fmaf(p, x, 0.5550347269e-1f);
  p = fmaf(p, x, 0.2402264476e+0f);
  p = fmaf(p, x, 0.6931471825e+0f);
  return fmaf(p, x, 1.0f);
}

static inline float block_sum(const float *x) {
  float lanes[LANES], sum = 0;
#pragma omp simd
  for (int i = 0; i < LANES; i++)
    lanes[i] = (x[i] + x[32 + i]) + (x[8 + i] + x[40 + i]) + (x[16 + i] + x[48 + i]) +
               (x[24 + i] + x[56 + i]);
  for (int i = 0; i < LANES; i++) sum += lanes[i];
  return sum;
}

/* Compute the weights of a block that has exponents below LOWEST; return whether it has a NaN. */
static int small_weights(const float *power, float *weight) {
  int nan = 0;
  for (int i = 0; i < BLOCK; i++) {
    float y = power[i] > -150 ? power[i] : -150;
    int32_t whole = (int32_t)rintf(y), half = whole >> 1;
    float fraction = exp2_fraction(power[i] - rintf(y));
    fraction *= as_float((half + 127) << 23);
    fraction *= as_float((whole - half + 127) << 23);
    weight[i] = power[i] < -150 ? 0 : fraction;
    nan |= power[i] != power[i];
  }
  return nan;
}

static float largest(const float *x, int64_t count) {
  float most = -INFINITY;
#pragma omp simd reduction(max : most)
  for (int64_t i = 0; i < count; i++) most = x[i] > most ? x[i] : most;
  return most;
}

/* Compute what `torch_block_sums` returns, except that the peak of a row whose logits are all -inf is
 * NaN. `moments` may be null. */
void block_sums(int threads, const float *logits, int64_t rows, int64_t vocabulary, float slope,
                float remainder, float *peaks, float *shifts, double *sums, double *moments) {
  const int64_t blocks = vocabulary / BLOCK;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const float *const z = logits + row * vocabulary;
    const int64_t ahead = row + 1 < rows ? vocabulary : 0;
    const float peak = largest(z, vocabulary), shift = rintf(peak * slope) - PEAK;
    int nan = 0;
    for (int64_t block = 0; block < blocks; block++) {
      float power[BLOCK], weight[BLOCK];
      const float *const few = z + block * BLOCK;
      int small = 0;
      /* The search for the next row's largest logit would otherwise wait for memory. */
      for (int i = 0; i < BLOCK; i += 16) __builtin_prefetch(few + ahead + i);
#pragma omp simd reduction(| : small)
      for (int i = 0; i < BLOCK; i++) {
        float y = fmaf(few[i], slope, -shift);
        power[i] = y = fmaf(y, remainder, y);
        y = y > LOWEST ? y : LOWEST;
        small |= y != power[i];
        const float whole = rintf(y);
        weight[i] = as_float(as_bits(exp2_fraction(y - whole)) + ((int32_t)whole << 23));
      }
      if (small) nan |= small_weights(power, weight);
      sums[row * blocks + block] = block_sum(weight);
      if (moments) {
#pragma omp simd
        for (int i = 0; i < BLOCK; i++)
          power[i] = weight[i] * (power[i] > NOTHING ? power[i] : NOTHING);
        moments[row * blocks + block] = block_sum(power);
      }
    }
    peaks[row] = nan ? NAN : peak;
    shifts[row] = shift;
  }
}
