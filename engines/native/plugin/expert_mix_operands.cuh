// What both kernels are given, and how they hold the four small operands. Compiles for the CPU too.
#pragma once

#include "expert_mix_launch.h"
#include "expert_mix_math.h"

namespace moe3d {

// The hidden map's rows are [expert 0 | ... | expert K-1 | gate]; shapes in moe3d_expert_mix.h.
template <class T>
struct Operands {
    const T* hidden;
    const float* expert_weight;
    const float* expert_bias;
    const float* gate_weight;
    const float* gate_bias;
    float* depth;
    float* confidence;
    float* weights;  // or null
    float inverse_temperature;
    int experts;
    int expert_width;
    int gate_width;
    std::int64_t views;
    std::int64_t pixels;  // of a view: H*W
    std::int64_t pixel_stride;
    std::uint32_t blocks_per_view;
};

template <class T>
Operands<T> operands(const Sizes& sizes, const Tensors& tensors, const Plan& plan) {
    return {static_cast<const T*>(tensors.hidden),
            tensors.expert_weight,
            tensors.expert_bias,
            tensors.gate_weight,
            tensors.gate_bias,
            tensors.depth,
            tensors.confidence,
            tensors.weights,
            1.0f / sizes.temperature,
            static_cast<int>(sizes.experts),
            static_cast<int>(sizes.expert_width),
            static_cast<int>(sizes.gate_width),
            sizes.views,
            sizes.height * sizes.width,
            plan.pixel_stride,
            static_cast<std::uint32_t>(plan.blocks_per_view)};
}

// The small operands, in shared memory (aligned to 16 bytes, as every row is) or where the caller has them (to 4).
template <bool InShared>
struct SmallOperands {
    const float* expert_weight;
    const float* gate_weight;
    const float* expert_bias;
    const float* gate_bias;

    static MOE3D_HOST_DEVICE void load4(const float* from, float (&to)[4]) {
        if constexpr (InShared) {
#if defined(__CUDA_ARCH__)
            const float4 word = *reinterpret_cast<const float4*>(from);
            to[0] = word.x, to[1] = word.y, to[2] = word.z, to[3] = word.w;
#else
            read_aligned(from, to);
#endif
        } else {
            MOE3D_UNROLL
            for (int i = 0; i < 4; ++i) load(from + i, reinterpret_cast<float(&)[1]>(to[i]));
        }
    }
};

template <class T>
MOE3D_HOST_DEVICE SmallOperands<false> in_place(const Operands<T>& o) {
    return {o.expert_weight, o.gate_weight, o.expert_bias, o.gate_bias};
}

template <class T>
MOE3D_HOST_DEVICE SmallOperands<true> in_shared(const Operands<T>& o, const float* shared) {
    const float* const gate_weight = shared + 2 * o.experts * o.expert_width;
    const float* const expert_bias = gate_weight + o.experts * o.gate_width;
    return {shared, gate_weight, expert_bias, expert_bias + 2 * o.experts};
}

// One thread's share of copying the small operands to shared memory, in the order that `in_shared` expects.
template <class T>
MOE3D_HOST_DEVICE void copy_to_shared(const Operands<T>& o, float* shared, int thread, int threads) {
    const auto copy = [&](const float* from, int count) {
        for (int i = thread; i < count; i += threads) shared[i] = from[i];
        shared += count;
    };
    copy(o.expert_weight, 2 * o.experts * o.expert_width);
    copy(o.gate_weight, o.experts * o.gate_width);
    copy(o.expert_bias, 2 * o.experts);
    copy(o.gate_bias, o.experts);
}

}  // namespace moe3d
