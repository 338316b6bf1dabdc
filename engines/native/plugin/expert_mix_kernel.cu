// The C entry of moe3d_expert_mix.h: checks, plan, launch.

#include <cuda_runtime.h>

#include "expert_mix_channels_last.cuh"
#include "expert_mix_planar.cuh"
#include "expert_mix_variants.h"

namespace moe3d {
namespace {

template <class V>
const void* kernel_of() {
    if constexpr (V::kLayout == MOE3D_CHANNELS_LAST) {
        return reinterpret_cast<const void*>(&channels_last_kernel<typename V::T, V::kMaxExperts, V::kInShared>);
    } else {
        return reinterpret_cast<const void*>(
            &planar_kernel<typename V::T, V::kPixelsPerThread, V::kMaxExperts, V::kInShared>);
    }
}

}  // namespace
}  // namespace moe3d

extern "C" int moe3d_expert_mix(const moe3d_expert_mix_sizes* sizes, const moe3d_expert_mix_tensors* tensors,
                                void* stream) {
    if (!sizes || !tensors) return MOE3D_ERROR_NULL;
    moe3d::Plan plan;
    if (const int status = moe3d::make_plan(*sizes, *tensors, &plan)) return status;
    if (plan.blocks == 0) return MOE3D_OK;
    return moe3d::with_variant(*sizes, plan, [&](auto variant) -> int {
        using V = decltype(variant);
        auto operands = moe3d::operands<typename V::T>(*sizes, *tensors, plan);
        void* arguments[] = {&operands};
        // Its own result, not cudaGetLastError's, which may be an older error of somebody else.
        const cudaError_t error =
            cudaLaunchKernel(moe3d::kernel_of<V>(), dim3(static_cast<unsigned>(plan.blocks)), dim3(plan.threads),
                             arguments, plan.shared_bytes, static_cast<cudaStream_t>(stream));
        if (error == cudaSuccess) return MOE3D_OK;
        cudaGetLastError();  // reported here: nobody after this call shall find it again
        return MOE3D_ERROR_CUDA + static_cast<int>(error);
    });
}

extern "C" int moe3d_abi_version(void) { return MOE3D_ABI_VERSION; }

extern "C" const char* moe3d_error_text(int status) {
    if (const char* const text = moe3d::status_text(status)) return text;
    return status >= MOE3D_ERROR_CUDA ? cudaGetErrorString(static_cast<cudaError_t>(status - MOE3D_ERROR_CUDA))
                                      : "unknown status";
}
