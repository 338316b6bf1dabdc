// The mix of a channels-last hidden map: (N, H, W, stride), stride >= C.
//
//   layout   a pixel's channels are neighbours. Groups of 4 lanes take 4 pixels together: of each pixel a lane reads
//            every fourth 16 bytes, so an access of a warp covers 8 pixels x 64 neighbouring bytes; then the partial
//            sums are exchanged so that each lane ends with the whole sums of one pixel
//   bytes    per pixel, read: (K Ce + Cg) * sizeof(T); written: 8, and 4 K more where the weights are wanted; per block
//            once the small operands
//   launch   blocks of 256 threads, a pixel a thread, ceil(N H W / 256) blocks
#pragma once

#include "expert_mix_operands.cuh"

namespace moe3d {

// sum[r][i] += the lane's part of weights[r] . (channels of pixel i), for `rows` of the Rows.
template <int Rows, bool InShared, class T>
MOE3D_HOST_DEVICE void lane_dots(const T* const (&pixel)[kGroup], int lane, int width, const float* weights, int rows,
                                 float (&sum)[Rows][kGroup]) {
    constexpr int kChunk = kWideAlignment / sizeof(T);  // channels
    MOE3D_NO_UNROLL
    for (int c = lane * kChunk; c < width; c += kGroup * kChunk) {
        float x[kGroup][kChunk];
        MOE3D_UNROLL
        for (int i = 0; i < kGroup; ++i) load(pixel[i] + c, x[i]);
        MOE3D_UNROLL
        for (int r = 0; r < Rows; ++r) {
            if (r >= rows) continue;
            MOE3D_UNROLL
            for (int part = 0; part < kChunk; part += 4) {
                float w[4];
                SmallOperands<InShared>::load4(weights + r * width + c + part, w);
                MOE3D_UNROLL
                for (int i = 0; i < kGroup; ++i) {
                    MOE3D_UNROLL
                    for (int j = 0; j < 4; ++j) sum[r][i] += w[j] * x[i][part + j];
                }
            }
        }
    }
}

// All of one group's work. `Lanes` stands for the lanes that the caller runs: one of four on a GPU, all on a CPU.
template <class T, int MaxExperts, class Lanes, bool InShared>
MOE3D_HOST_DEVICE void channels_last_group(const Operands<T>& o, const SmallOperands<InShared>& small,
                                           std::int64_t first_pixel, const Lanes& lanes) {
    const std::int64_t end = o.views * o.pixels;
    const T* pixel[kGroup];
    MOE3D_UNROLL
    for (int i = 0; i < kGroup; ++i) {  // lanes without a pixel work on the last one: all must take part in exchanges
        const std::int64_t index = first_pixel + i < end ? first_pixel + i : end - 1;
        pixel[i] = o.hidden + index * o.pixel_stride;
    }

    // sums[lane][row]: of the lane's own pixel.
    const auto dots = [&](const T* const(&from)[kGroup], int width, const float* weights, auto& sums, int rows) {
        constexpr int kRows = sizeof(sums[0]) / sizeof(float);
        float partial[Lanes::kCount][kRows][kGroup] = {};
        MOE3D_UNROLL
        for (int l = 0; l < Lanes::kCount; ++l) {
            lane_dots<kRows, InShared>(from, lanes.lane(l), width, weights, rows, partial[l]);
        }
        MOE3D_UNROLL
        for (int r = 0; r < kRows; ++r) {
            if (r < rows) lanes.exchange(partial, r, sums);
        }
    };

    const int gate_channel = o.experts * o.expert_width;
    const T* gate[kGroup];
    MOE3D_UNROLL
    for (int i = 0; i < kGroup; ++i) gate[i] = pixel[i] + gate_channel;
    float weight[Lanes::kCount][MaxExperts];
    dots(gate, o.gate_width, small.gate_weight, weight, o.experts);
    MOE3D_UNROLL
    for (int l = 0; l < Lanes::kCount; ++l) {
        MOE3D_UNROLL
        for (int k = 0; k < MaxExperts; ++k) {
            if (k < o.experts) weight[l][k] += small.gate_bias[k];
        }
        softmax(weight[l], o.experts, o.inverse_temperature);
    }

    std::int64_t own[Lanes::kCount];
    MOE3D_UNROLL
    for (int l = 0; l < Lanes::kCount; ++l) own[l] = first_pixel + lanes.lane(l);
    if (o.weights) {
        MOE3D_UNROLL
        for (int l = 0; l < Lanes::kCount; ++l) {
            const std::int64_t view = own[l] / o.pixels;
            float* const to = o.weights + view * (o.experts - 1) * o.pixels + own[l];  // (view, 0, pixel of the view)
            MOE3D_UNROLL
            for (int k = 0; k < MaxExperts; ++k) {
                if (k < o.experts && own[l] < end) to[k * o.pixels] = weight[l][k];
            }
        }
    }

    float depth[Lanes::kCount] = {};
    float confidence[Lanes::kCount] = {};
    MOE3D_NO_UNROLL
    for (int k = 0; k < o.experts; ++k) {
        float raw[Lanes::kCount][2];
        dots(pixel, o.expert_width, small.expert_weight + 2 * k * o.expert_width, raw, 2);
        MOE3D_UNROLL
        for (int i = 0; i < kGroup; ++i) pixel[i] += o.expert_width;
        MOE3D_UNROLL
        for (int l = 0; l < Lanes::kCount; ++l) {
            add_expert(weight[l][0], raw[l][0] + small.expert_bias[2 * k], raw[l][1] + small.expert_bias[2 * k + 1],
                       depth[l], confidence[l]);
            // The next expert's weight moves to the front: an index known at run time only would need local memory.
            MOE3D_UNROLL
            for (int next = 1; next < MaxExperts; ++next) weight[l][next - 1] = weight[l][next];
        }
    }
    MOE3D_UNROLL
    for (int l = 0; l < Lanes::kCount; ++l) {
        if (own[l] >= end) continue;
        o.depth[own[l]] = depth[l];
        o.confidence[own[l]] = confidence[l] + 1.0f;
    }
}

// A lane's partial sums of 2 N pixels: the N that it goes on with, and the N that its partner does. Twice of it, with
// the lanes whose number differs in the second bit and then in the first, leave lane i with pixel i.
template <int N>
MOE3D_HOST_DEVICE void halve(bool upper, const float (&sums)[2 * N], float (&kept)[N], float (&sent)[N]) {
    MOE3D_UNROLL
    for (int i = 0; i < N; ++i) {
        kept[i] = upper ? sums[N + i] : sums[i];
        sent[i] = upper ? sums[i] : sums[N + i];
    }
}

// All lanes of a group in turn, on a CPU.
struct AllLanes {
    static constexpr int kCount = kGroup;
    int lane(int l) const { return l; }

    template <int Rows, int Columns>
    void exchange(const float (&partial)[kCount][Rows][kGroup], int row, float (&sums)[kCount][Columns]) const {
        float pairs[kCount][2], sent2[kCount][2], kept[kCount][1], sent1[kCount][1];
        for (int l = 0; l < kCount; ++l) halve<2>(l & 2, partial[l][row], pairs[l], sent2[l]);
        for (int l = 0; l < kCount; ++l) {
            for (int i = 0; i < 2; ++i) pairs[l][i] += sent2[l ^ 2][i];
            halve<1>(l & 1, pairs[l], kept[l], sent1[l]);
        }
        for (int l = 0; l < kCount; ++l) sums[l][row] = kept[l][0] + sent1[l ^ 1][0];
    }
};

#if defined(__CUDACC__)
// The lane that runs.
struct OwnLane {
    static constexpr int kCount = 1;
    __device__ __forceinline__ int lane(int) const { return threadIdx.x % kGroup; }

    template <int Rows, int Columns>
    __device__ __forceinline__ void exchange(const float (&partial)[1][Rows][kGroup], int row,
                                             float (&sums)[1][Columns]) const {
        constexpr unsigned kAll = 0xffffffffu;
        float pair[2], sent2[2], kept[1], sent1[1];
        halve<2>(threadIdx.x & 2, partial[0][row], pair, sent2);
        pair[0] += __shfl_xor_sync(kAll, sent2[0], 2);
        pair[1] += __shfl_xor_sync(kAll, sent2[1], 2);
        halve<1>(threadIdx.x & 1, pair, kept, sent1);
        sums[0][row] = kept[0] + __shfl_xor_sync(kAll, sent1[0], 1);
    }
};

template <class T, int MaxExperts, bool InShared>
__global__ void __launch_bounds__(kChannelsLastThreads) channels_last_kernel(const __grid_constant__ Operands<T> o) {
    const std::int64_t first =
        static_cast<std::int64_t>(blockIdx.x) * kChannelsLastThreads + threadIdx.x / kGroup * kGroup;
    if constexpr (InShared) {
        extern __shared__ float4 shared_words[];
        float* const shared = reinterpret_cast<float*>(shared_words);
        copy_to_shared(o, shared, threadIdx.x, kChannelsLastThreads);
        __syncthreads();
        channels_last_group<T, MaxExperts>(o, in_shared(o, shared), first, OwnLane{});
    } else {
        channels_last_group<T, MaxExperts>(o, in_place(o), first, OwnLane{});
    }
}
#endif

}  // namespace moe3d
