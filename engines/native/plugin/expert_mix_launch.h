// What can be decided about a mix before any kernel runs: whether the sizes and pointers are good, which kernel takes
// them, and with how many blocks. Needs neither CUDA nor TensorRT.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "moe3d_expert_mix.h"

namespace moe3d {

using Sizes = moe3d_expert_mix_sizes;
using Tensors = moe3d_expert_mix_tensors;

constexpr int kMaxExperts = 16;
constexpr int kWidthStep = 8;  // channels: widths are multiples of it, so that 16 bytes never span two experts

constexpr int kWidePixels = 4;                   // NCHW: pixels of a thread where planes are aligned, else 1
constexpr int kGroup = 4;                        // channels last: lanes that share pixels, and pixels that they share
constexpr int kPlanarThreads = 128;              // of a block
constexpr int kChannelsLastThreads = 256;        // of a block
constexpr int kWideAlignment = 16;               // bytes
constexpr std::int64_t kMaxBlocks = 2147483647;  // of a grid's x axis
// Shared memory that every GPU grants without being asked. Weights above it are read from global memory.
constexpr std::int64_t kMaxSharedBytes = 48 * 1024;

// Raised whenever a kernel changes: timings of older kernels do not hold for it.
constexpr int kKernelRevision = 1;

// Which kernel, and its grid.
struct Plan {
    int pixels_per_thread;         // NCHW: 4 or 1; channels last: 1
    int experts_bound;             // 4, 8 or 16: the kernel compiled for at least K experts
    bool weights_in_shared;        // else they are read from global memory
    int shared_bytes;              // of a block
    int threads;                   // of a block
    std::int64_t blocks;           // 0: nothing to do
    std::int64_t blocks_per_view;  // NCHW: a block stays within a view; channels last: 0
    std::int64_t pixel_stride;     // channels last: elements from a pixel to the next
};

constexpr int element_bytes(int type) { return type == MOE3D_FLOAT32 ? 4 : 2; }

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// a * b for a, b >= 0, or -1 where that is above `limit`, or where a is -1 already.
constexpr std::int64_t product(std::int64_t a, std::int64_t b, std::int64_t limit) {
    return a < 0 || (b > 0 && a > limit / b) ? -1 : a * b;
}

constexpr std::int64_t channels(const Sizes& sizes) { return sizes.experts * sizes.expert_width + sizes.gate_width; }

// The smallest compiled bound that holds K experts.
constexpr int experts_bound(std::int64_t experts) {
    int bound = 4;
    while (bound < experts) bound *= 2;
    return bound;
}

// Floats of the four operands together.
constexpr std::int64_t operand_floats(const Sizes& sizes) {
    return sizes.experts * (2 * sizes.expert_width + sizes.gate_width + 3);
}

// MOE3D_OK, or what is wrong with the sizes themselves.
inline int check_sizes(const Sizes& sizes) {
    constexpr std::int64_t kMaxChannels = 2147483647;
    constexpr std::int64_t kMaxBytes = INT64_MAX / 16;
    const auto bad_width = [](std::int64_t width) { return width <= 0 || width % kWidthStep != 0; };
    if (sizes.type < MOE3D_FLOAT32 || sizes.type > MOE3D_BFLOAT16) return MOE3D_ERROR_TYPE;
    if (sizes.layout != MOE3D_NCHW && sizes.layout != MOE3D_CHANNELS_LAST) return MOE3D_ERROR_LAYOUT;
    if (sizes.experts < 1 || sizes.experts > kMaxExperts) return MOE3D_ERROR_EXPERTS;
    if (bad_width(sizes.expert_width) || bad_width(sizes.gate_width)) return MOE3D_ERROR_WIDTH;
    if (sizes.views < 0 || sizes.height < 0 || sizes.width < 0) return MOE3D_ERROR_SIZE;
    // Normal numbers alone: the reciprocal of a smaller one is infinite.
    if (!(sizes.temperature > 0.0f) || !std::isnormal(sizes.temperature)) return MOE3D_ERROR_TEMPERATURE;
    // 3 K (Ce + Cg) bounds the operands, K Ce + Cg the channels: both fit an int32 then.
    constexpr std::int64_t kMaxWidth = kMaxChannels / (4 * kMaxExperts);
    if (sizes.expert_width > kMaxWidth || sizes.gate_width > kMaxWidth) return MOE3D_ERROR_TOO_LARGE;

    std::int64_t row = channels(sizes);
    if (sizes.layout == MOE3D_NCHW) {
        if (sizes.pixel_stride != 0) return MOE3D_ERROR_STRIDE;
    } else if (sizes.pixel_stride != 0) {
        if (sizes.pixel_stride < row || sizes.pixel_stride % kWidthStep != 0) return MOE3D_ERROR_STRIDE;
        row = sizes.pixel_stride;
    }
    // Every element of the largest tensor has an offset in bytes that fits an int64; empty maps count as 1.
    std::int64_t bytes = product(row > kMaxExperts ? row : kMaxExperts, 4, kMaxBytes);
    for (const std::int64_t size : {sizes.views, sizes.height, sizes.width}) {
        bytes = product(bytes, size > 0 ? size : 1, kMaxBytes);
    }
    return bytes < 0 ? MOE3D_ERROR_TOO_LARGE : MOE3D_OK;
}

inline bool aligned(const void* pointer, int bytes) { return reinterpret_cast<std::uintptr_t>(pointer) % bytes == 0; }

// MOE3D_OK, or which rule the pointers break. Pointers are not read.
inline int check_tensors(const Sizes& sizes, const Tensors& tensors) {
    const void* const floats[] = {tensors.expert_weight, tensors.expert_bias, tensors.gate_weight, tensors.gate_bias,
                                  tensors.depth,         tensors.confidence,  tensors.weights};
    const int optional = 6;
    if (!tensors.hidden) return MOE3D_ERROR_NULL;
    for (int i = 0; i < optional; ++i) {
        if (!floats[i]) return MOE3D_ERROR_NULL;
    }
    for (const void* const pointer : floats) {
        if (!aligned(pointer, sizeof(float))) return MOE3D_ERROR_ALIGNMENT;
    }
    const int needed = sizes.layout == MOE3D_CHANNELS_LAST ? kWideAlignment : element_bytes(sizes.type);
    return aligned(tensors.hidden, needed) ? MOE3D_OK : MOE3D_ERROR_ALIGNMENT;
}

// The launch for good sizes and pointers; else the first rule that they break, and `plan` is left alone.
inline int make_plan(const Sizes& sizes, const Tensors& tensors, Plan* plan) {
    if (const int status = check_sizes(sizes)) return status;
    const std::int64_t pixels = sizes.height * sizes.width;  // of a view
    const bool empty = sizes.views == 0 || pixels == 0;      // then pointers may be anything
    if (!empty) {
        if (const int status = check_tensors(sizes, tensors)) return status;
    }

    Plan made{};
    made.pixels_per_thread = 1;
    made.experts_bound = experts_bound(sizes.experts);
    const std::int64_t operand_bytes = operand_floats(sizes) * static_cast<std::int64_t>(sizeof(float));
    made.weights_in_shared = operand_bytes <= kMaxSharedBytes;
    made.shared_bytes = made.weights_in_shared ? static_cast<int>(operand_bytes) : 0;
    if (sizes.layout == MOE3D_NCHW) {
        // Planes are H*W elements apart: only multiples of 4 keep every plane of hidden and outputs aligned. The
        // kernels for weights in global memory are the plainest ones.
        bool wide = made.weights_in_shared && pixels % kWidePixels == 0 &&
                    aligned(tensors.hidden, kWidePixels * element_bytes(sizes.type));
        for (const float* const output : {tensors.depth, tensors.confidence, tensors.weights}) {
            wide = wide && aligned(output, kWideAlignment);
        }
        made.pixels_per_thread = wide ? kWidePixels : 1;
        made.threads = kPlanarThreads;
        made.blocks_per_view = ceil_div(pixels, kPlanarThreads * made.pixels_per_thread);
        made.blocks = product(sizes.views, made.blocks_per_view, kMaxBlocks);
    } else {
        made.threads = kChannelsLastThreads;
        made.pixel_stride = sizes.pixel_stride ? sizes.pixel_stride : channels(sizes);
        made.blocks = product(ceil_div(sizes.views * pixels, kChannelsLastThreads), 1, kMaxBlocks);
    }
    if (made.blocks < 0) return MOE3D_ERROR_TOO_LARGE;
    if (!made.weights_in_shared) made.experts_bound = kMaxExperts;
    *plan = made;
    return MOE3D_OK;
}

// Text of the statuses that need no CUDA; null for others.
inline const char* status_text(int status) {
    switch (status) {
        case MOE3D_OK: return "ok";
        case MOE3D_ERROR_NULL: return "a required pointer is null; only `weights` may be";
        case MOE3D_ERROR_TYPE: return "unknown type of the hidden map; expected float32, float16 or bfloat16";
        case MOE3D_ERROR_LAYOUT: return "unknown layout of the hidden map; expected NCHW or channels last";
        case MOE3D_ERROR_EXPERTS: return "the number of experts is out of range; expected 1 to 16";
        case MOE3D_ERROR_WIDTH: return "a width of expert or gate is wrong; expected a positive multiple of 8 channels";
        case MOE3D_ERROR_SIZE: return "views, height or width is negative";
        case MOE3D_ERROR_STRIDE:
            return "wrong pixel stride; channels last: 0 or a multiple of 8 that is at least the number of channels; "
                   "NCHW: 0";
        case MOE3D_ERROR_TEMPERATURE: return "the temperature is wrong; expected a finite number of at least 1.2e-38";
        case MOE3D_ERROR_ALIGNMENT:
            return "a pointer is misaligned; expected the size of an element, and 16 bytes for a channels-last map";
        case MOE3D_ERROR_TOO_LARGE: return "the tensors are too large to be addressed; mix fewer views at a time";
        default: return nullptr;
    }
}

}  // namespace moe3d
