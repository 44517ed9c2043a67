/* Sum weights by block like `sum_by_block` in distribution.py; compiled by compiled.py.
 *
 * The operations are those of the PyTorch code with one thread, in the same order, so that results
 * are equal in every bit: torch.exp2 is Sleef's exp2 (u10), torch.add is a fused multiply-add, and
 * torch.sum of 64 numbers adds vectors of 8 floats or 4 doubles, then their lanes one after the
 * other.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

enum { BLOCK = 64, LANES = 8 };
static const float PEAK = 8, NOTHING = -1000, LOWEST = -125, UNIT = 1 << 20;

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

static inline double as_double(int64_t bits) {
  double number;
  memcpy(&number, &bits, sizeof number);
  return number;
}

static inline int64_t as_bits_double(double number) {
  int64_t bits;
  memcpy(&bits, &number, sizeof bits);
  return bits;
}

/* 2 ** x for |x| <= 0.5 */
static inline double exp2_fraction_double(double x) {
  const double x2 = x * x, x4 = x2 * x2, x8 = x4 * x4;
  const double c8 = fma(x, 0.4434359082926529454e-9, 0.7073164598085707425e-8);
  const double c6 = fma(x, 0.1017819260921760451e-6, 0.1321543872511327615e-5);
  const double c4 = fma(x, 0.1525273353517584730e-4, 0.1540353045101147808e-3);
  const double c2 = fma(x, 0.1333355814670499073e-2, 0.9618129107597600536e-2);
  const double c0 = fma(x, 0.5550410866482046596e-1, 0.2402265069591012214e+0);
  const double p = fma(x8, c8, fma(x4, fma(x2, c6, c4), fma(x2, c2, c0)));
  return fma(fma(p, x, 0.6931471805599452862e+0), x, 1.0);
}

static inline double block_sum_double(const double *x) {
  double lanes[4], sum = 0;
#pragma omp simd
  for (int i = 0; i < 4; i++) {
    double four[4];
    for (int k = 0; k < 4; k++)
      four[k] = x[4 * k + i] + x[16 + 4 * k + i] + x[32 + 4 * k + i] + x[48 + 4 * k + i];
    lanes[i] = four[0] + four[1] + four[2] + four[3];
  }
  for (int i = 0; i < 4; i++) sum += lanes[i];
  return sum;
}

/* Sum the weights of a block in float64. */
static double exact_sum(const float *logits, double slope, double shift) {
  double weight[BLOCK];
#pragma omp simd
  for (int i = 0; i < BLOCK; i++) {
    const double power = fma(logits[i], slope, -shift);
    const double y = power > NOTHING ? power : NOTHING, whole = rint(y);
    const int64_t bits = as_bits_double(exp2_fraction_double(y - whole));
    const double scaled = as_double(bits + ((int64_t)(int32_t)whole << 52));
    weight[i] = power > NOTHING ? scaled : 0;
  }
  return block_sum_double(weight);
}

/* Arguments and results are those of `Library.sums` in compiled.py. The peak of a row with a NaN, or
 * without a finite logit, is NaN. `moments` may be null. */
void block_sums(int threads, const float *logits, int64_t rows, int64_t vocabulary, double slope,
                float factor, float remainder, double limit, float *peaks, double *shifts,
                double *sums, double *moments) {
  const int64_t blocks = vocabulary / BLOCK;
#pragma omp parallel for num_threads(threads)
  for (int64_t row = 0; row < rows; row++) {
    const float *const z = logits + row * vocabulary;
    double *const sum = sums + row * blocks;
    const int64_t ahead = row + 1 < rows ? vocabulary : 0;
    const float peak = largest(z, vocabulary), shift = peak * factor - PEAK;
    int nan = 0;
    int64_t total = 0;
    for (int64_t block = 0; block < blocks; block++) {
      float power[BLOCK], weight[BLOCK];
      const float *const few = z + block * BLOCK;
      int small = 0;
      /* The search for the next row's largest logit would otherwise wait for memory. */
      for (int i = 0; i < BLOCK; i += 16) __builtin_prefetch(few + ahead + i);
#pragma omp simd reduction(| : small)
      for (int i = 0; i < BLOCK; i++) {
        float y = fmaf(few[i], factor, -shift);
        power[i] = y = fmaf(y, remainder, y);
        y = y > LOWEST ? y : LOWEST;
        small |= y != power[i];
        const float whole = rintf(y);
        weight[i] = as_float(as_bits(exp2_fraction(y - whole)) + ((int32_t)whole << 23));
      }
      if (small) nan |= small_weights(power, weight);
      sum[block] = block_sum(weight);
      if (!nan) total += (int64_t)(sum[block] * UNIT);
      if (moments) {
#pragma omp simd
        for (int i = 0; i < BLOCK; i++)
          power[i] = weight[i] * (power[i] > NOTHING ? power[i] : NOTHING);
        moments[row * blocks + block] = block_sum(power);
      }
    }
    peaks[row] = nan ? NAN : peak;
    shifts[row] = shift * (1 + (double)remainder);
    const double whole = (double)total / UNIT, heavy = limit * (whole * whole);
    for (int64_t block = 0; block < blocks; block++)
      if (sum[block] > heavy) sum[block] = exact_sum(z + block * BLOCK, slope, shifts[row]);
  }
}
