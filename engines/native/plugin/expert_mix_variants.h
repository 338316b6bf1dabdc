// The list of compiled kernels, in one place: what a plan can name, the GPU's entry launches and the CPU's form runs.
#pragma once

#include "expert_mix_launch.h"
#include "expert_mix_math.h"

namespace moe3d {

template <class Element, int Layout, int PixelsPerThread, int MaxExperts, bool InShared>
struct Variant {
    using T = Element;
    static constexpr int kLayout = Layout;
    static constexpr int kPixelsPerThread = PixelsPerThread;
    static constexpr int kMaxExperts = MaxExperts;
    static constexpr bool kInShared = InShared;
};

template <class T, int Layout, int PixelsPerThread, class Run>
int with_experts(const Plan& plan, const Run& run) {
    switch (plan.experts_bound) {
        case 4: return run(Variant<T, Layout, PixelsPerThread, 4, true>{});
        case 8: return run(Variant<T, Layout, PixelsPerThread, 8, true>{});
        default: return run(Variant<T, Layout, PixelsPerThread, 16, true>{});
    }
}

template <class T, class Run>
int with_layout(int layout, const Plan& plan, const Run& run) {
    if (layout == MOE3D_CHANNELS_LAST) {
        if (!plan.weights_in_shared) return run(Variant<T, MOE3D_CHANNELS_LAST, 1, kMaxExperts, false>{});
        return with_experts<T, MOE3D_CHANNELS_LAST, 1>(plan, run);
    }
    if (!plan.weights_in_shared) return run(Variant<T, MOE3D_NCHW, 1, kMaxExperts, false>{});
    if (plan.pixels_per_thread == kWidePixels) return with_experts<T, MOE3D_NCHW, kWidePixels>(plan, run);
    return with_experts<T, MOE3D_NCHW, 1>(plan, run);
}

// run(Variant<...>{}) with the plan's variant; returns what that returns.
template <class Run>
int with_variant(const Sizes& sizes, const Plan& plan, const Run& run) {
    switch (sizes.type) {
        case MOE3D_FLOAT16: return with_layout<Half>(sizes.layout, plan, run);
        case MOE3D_BFLOAT16: return with_layout<BFloat16>(sizes.layout, plan, run);
        default: return with_layout<float>(sizes.layout, plan, run);
    }
}

}  // namespace moe3d
