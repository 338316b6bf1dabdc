// The arithmetic of one pixel, for the CPU and the GPU from one source: the tests of the CPU's form are the kernels'.
//
// Everything is float32 from the first product on. No memory is touched here but by `load`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define MOE3D_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MOE3D_HOST_DEVICE inline
#endif
#if defined(__CUDA_ARCH__)
#define MOE3D_UNROLL _Pragma("unroll")
#define MOE3D_NO_UNROLL _Pragma("unroll 1")
#else
#define MOE3D_UNROLL
#define MOE3D_NO_UNROLL
#endif

namespace moe3d {

struct Half {
    std::uint16_t bits;
};

struct BFloat16 {
    std::uint16_t bits;
};

MOE3D_HOST_DEVICE float float_from_bits(std::uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

MOE3D_HOST_DEVICE float to_float(float value) { return value; }

MOE3D_HOST_DEVICE float to_float(BFloat16 value) { return float_from_bits(std::uint32_t{value.bits} << 16); }

MOE3D_HOST_DEVICE float to_float(Half value) {
#if defined(__CUDA_ARCH__)
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
#else
    const std::uint32_t sign = std::uint32_t{value.bits} >> 15 << 31;
    const std::uint32_t exponent = value.bits >> 10 & 31;
    const std::uint32_t fraction = value.bits & 1023;
    if (exponent == 0) {  // zero and subnormal: fraction * 2^-24
        const float magnitude = static_cast<float>(fraction) * float_from_bits((127u - 24u) << 23);
        return sign ? -magnitude : magnitude;
    }
    if (exponent == 31) return float_from_bits(sign | 0x7f800000u | fraction << 13);
    return float_from_bits(sign | (exponent + 127 - 15) << 23 | fraction << 13);
#endif
}

// The CPU's form of an access of N elements at once: UndefinedBehaviorSanitizer finds the misaligned ones.
template <class T, int N>
struct alignas(N * sizeof(T)) Pack {
    T values[N];
};

template <class T, int N>
void read_aligned(const T* from, T (&to)[N]) {
    const Pack<T, N> pack = *reinterpret_cast<const Pack<T, N>*>(from);
    std::memcpy(to, pack.values, sizeof to);
}

template <class T, int N>
void write_aligned(const T (&from)[N], T* to) {
    Pack<T, N> pack;
    std::memcpy(pack.values, from, sizeof from);
    *reinterpret_cast<Pack<T, N>*>(to) = pack;
}

// Reads N neighbours in one access of N * sizeof(T) bytes (2, 4, 8 or 16), which `from` must be aligned to.
template <int N, class T>
MOE3D_HOST_DEVICE void load(const T* from, float (&to)[N]) {
    static_assert(sizeof(T) == 2 || sizeof(T) == 4);
    T values[N];
#if defined(__CUDA_ARCH__)
    using Wide = std::conditional_t<sizeof(values) == 16, uint4, uint2>;
    using Narrow = std::conditional_t<sizeof(values) == 4, unsigned int, unsigned short>;
    using Word = std::conditional_t<(sizeof(values) > 4), Wide, Narrow>;
    static_assert(sizeof(Word) == sizeof(values));
    // The map is read once, so a full-width read leaves the caches to others. A warp's single elements may end within
    // a sector that the next warp needs too: those stay.
    const Word word = N > 1 ? __ldcs(reinterpret_cast<const Word*>(from)) : __ldg(reinterpret_cast<const Word*>(from));
    std::memcpy(values, &word, sizeof values);
#else
    read_aligned(from, values);
#endif
    MOE3D_UNROLL
    for (int i = 0; i < N; ++i) to[i] = to_float(values[i]);
}

// logits -> weights of `experts` experts, in place. The largest logit is subtracted before the temperature divides, so
// that no finite logit overflows however small that is. A NaN, or infinities that leave no answer, make all NaN.
template <int MaxExperts>
MOE3D_HOST_DEVICE void softmax(float (&values)[MaxExperts], int experts, float inverse_temperature) {
    float largest = values[0];
    MOE3D_UNROLL
    for (int k = 1; k < MaxExperts; ++k) {
        if (k < experts) largest = fmaxf(largest, values[k]);
    }
    float sum = 0.0f;
    MOE3D_UNROLL
    for (int k = 0; k < MaxExperts; ++k) {
        if (k < experts) {
            values[k] = expf((values[k] - largest) * inverse_temperature);
            sum += values[k];
        }
    }
    const float scale = 1.0f / sum;  // the sum is 1 to K, or NaN
    MOE3D_UNROLL
    for (int k = 0; k < MaxExperts; ++k) {
        if (k < experts) values[k] *= scale;
    }
}

// One expert's part in a pixel. `confidence` starts at 0; the 1 is added to the finished sum, since the weights add up
// to 1 only up to rounding and no confidence may be below 1.
MOE3D_HOST_DEVICE void add_expert(float weight, float log_depth, float log_confidence, float& depth,
                                  float& confidence) {
    depth += weight * expf(log_depth);
    confidence += weight * expf(log_confidence);
}

}  // namespace moe3d
