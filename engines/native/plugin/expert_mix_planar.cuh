// The mix of a hidden map in NCHW.
//
//   layout   a channel's H*W values are neighbours, so a thread's pixels share every weight it reads
//   bytes    per pixel, read: (K Ce + Cg) * sizeof(T); written: 8, and 4 K more where the weights are wanted; per block
//            once the small operands
//   launch   blocks of 128 threads, Pixels a thread, N * ceil(H W / (128 Pixels)) blocks; a block stays within a view
//
// Pixels = 4: one access per channel for 4 neighbours; needs planes aligned to 4 elements. Pixels = 1: for every other
// H*W or pointer.
#pragma once

#include "expert_mix_operands.cuh"

namespace moe3d {

// sum[r][i] += weights[r] . (channels of pixel i) for `rows` of the Rows. `from` is the thread's first pixel in the
// first of `width` channels.
template <int Pixels, int Rows, bool InShared, class T>
MOE3D_HOST_DEVICE void planar_dots(const T* from, std::int64_t plane, int width, const float* weights, int rows,
                                   float (&sum)[Rows][Pixels]) {
    MOE3D_NO_UNROLL
    for (int c = 0; c < width; c += kWidthStep) {
        float x[kWidthStep][Pixels];
        MOE3D_UNROLL
        for (int j = 0; j < kWidthStep; ++j) {
            load(from, x[j]);
            from += plane;
        }
        MOE3D_UNROLL
        for (int r = 0; r < Rows; ++r) {
            if (r >= rows) continue;
            MOE3D_UNROLL
            for (int half = 0; half < kWidthStep; half += 4) {
                float w[4];
                SmallOperands<InShared>::load4(weights + r * width + c + half, w);
                MOE3D_UNROLL
                for (int j = 0; j < 4; ++j) {
                    MOE3D_UNROLL
                    for (int i = 0; i < Pixels; ++i) sum[r][i] += w[j] * x[half + j][i];
                }
            }
        }
    }
}

template <int Pixels>
MOE3D_HOST_DEVICE void planar_store(const float (&values)[Pixels], float* to) {
#if defined(__CUDA_ARCH__)
    if constexpr (Pixels == 4) {
        // By name: a plain assignment is compiled to four stores of 4 bytes.
        __stcg(reinterpret_cast<float4*>(to), make_float4(values[0], values[1], values[2], values[3]));
    } else {
        *to = values[0];
    }
#else
    write_aligned(values, to);
#endif
}

// All of one thread's work.
template <class T, int Pixels, int MaxExperts, bool InShared>
MOE3D_HOST_DEVICE void planar_thread(const Operands<T>& o, const SmallOperands<InShared>& small, std::uint32_t block,
                                     int thread) {
    const std::int64_t view = block / o.blocks_per_view;
    const std::int64_t slot = static_cast<std::int64_t>(block % o.blocks_per_view) * kPlanarThreads + thread;
    const std::int64_t pixel = slot * Pixels;
    if (pixel >= o.pixels) return;  // H*W is a multiple of Pixels: the others are there too

    const int gate_channel = o.experts * o.expert_width;
    const T* const hidden = o.hidden + view * (gate_channel + o.gate_width) * o.pixels + pixel;
    float weight[MaxExperts][Pixels];
    MOE3D_UNROLL
    for (int k = 0; k < MaxExperts; ++k) {
        MOE3D_UNROLL
        for (int i = 0; i < Pixels; ++i) weight[k][i] = k < o.experts ? small.gate_bias[k] : 0.0f;
    }
    planar_dots<Pixels, MaxExperts, InShared>(hidden + gate_channel * o.pixels, o.pixels, o.gate_width,
                                              small.gate_weight, o.experts, weight);
    MOE3D_UNROLL
    for (int i = 0; i < Pixels; ++i) {
        float of_pixel[MaxExperts];
        MOE3D_UNROLL
        for (int k = 0; k < MaxExperts; ++k) of_pixel[k] = weight[k][i];
        softmax(of_pixel, o.experts, o.inverse_temperature);
        MOE3D_UNROLL
        for (int k = 0; k < MaxExperts; ++k) weight[k][i] = of_pixel[k];
    }

    float depth[Pixels] = {};
    float confidence[Pixels] = {};
    const T* channels = hidden;
    MOE3D_NO_UNROLL
    for (int k = 0; k < o.experts; ++k) {
        float raw[2][Pixels];
        MOE3D_UNROLL
        for (int r = 0; r < 2; ++r) {
            MOE3D_UNROLL
            for (int i = 0; i < Pixels; ++i) raw[r][i] = small.expert_bias[2 * k + r];
        }
        planar_dots<Pixels, 2, InShared>(channels, o.pixels, o.expert_width,
                                         small.expert_weight + 2 * k * o.expert_width, 2, raw);
        channels += o.expert_width * o.pixels;
        MOE3D_UNROLL
        for (int i = 0; i < Pixels; ++i) add_expert(weight[0][i], raw[0][i], raw[1][i], depth[i], confidence[i]);
        if (o.weights) {
            planar_store<Pixels>(weight[0], o.weights + (view * o.experts + k) * o.pixels + pixel);
        }
        // The next expert's weights move to the front: an index known at run time only would need local memory.
        MOE3D_UNROLL
        for (int next = 1; next < MaxExperts; ++next) {
            MOE3D_UNROLL
            for (int i = 0; i < Pixels; ++i) weight[next - 1][i] = weight[next][i];
        }
    }
    MOE3D_UNROLL
    for (int i = 0; i < Pixels; ++i) confidence[i] += 1.0f;
    planar_store<Pixels>(depth, o.depth + view * o.pixels + pixel);
    planar_store<Pixels>(confidence, o.confidence + view * o.pixels + pixel);
}

#if defined(__CUDACC__)
template <class T, int Pixels, int MaxExperts, bool InShared>
__global__ void __launch_bounds__(kPlanarThreads) planar_kernel(const __grid_constant__ Operands<T> o) {
    if constexpr (InShared) {
        extern __shared__ float4 shared_words[];
        float* const shared = reinterpret_cast<float*>(shared_words);
        copy_to_shared(o, shared, threadIdx.x, kPlanarThreads);
        __syncthreads();
        planar_thread<T, Pixels, MaxExperts>(o, in_shared(o, shared), blockIdx.x, threadIdx.x);
    } else {
        planar_thread<T, Pixels, MaxExperts>(o, in_place(o), blockIdx.x, threadIdx.x);
    }
}
#endif

}  // namespace moe3d
