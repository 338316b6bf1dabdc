/* The C entry to the expert-mix kernels: device pointers in, device pointers out, on the caller's stream.
 *
 * Per pixel, with h the hidden map's channels [expert 0 | ... | expert K-1 | gate]:
 *
 *   (v_k, c_k) = expert_weight[k] h_k + expert_bias[k]
 *   w = softmax((gate_weight h_gate + gate_bias) / temperature)
 *   depth = sum_k w_k exp(v_k)        confidence = 1 + sum_k w_k exp(c_k)
 *
 * Sums, softmax and exp are float32 whatever the type of the hidden map. A NaN among a pixel's channels gives a NaN.
 *
 * Threads: may be called from several threads at once. It allocates nothing and waits for nothing: the work is queued
 * on the stream of the current device, so errors of its execution show up at the caller's next synchronisation.
 */
#ifndef MOE3D_EXPERT_MIX_H
#define MOE3D_EXPERT_MIX_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* Raised whenever a structure, an enumeration or the meaning of an argument changes: a caller compiled for one number
 * must not call a library that answers another. */
#define MOE3D_ABI_VERSION 1

/* Type of the hidden map; everything else is float32. */
enum moe3d_type { MOE3D_FLOAT32 = 0, MOE3D_FLOAT16 = 1, MOE3D_BFLOAT16 = 2 };

/* How the hidden map (N, C, H, W) lies in memory. */
enum moe3d_layout {
    MOE3D_NCHW = 0,         /* contiguous; fastest where H*W is a multiple of 4 and pointers are aligned to 16 bytes */
    MOE3D_CHANNELS_LAST = 1 /* (N, H, W, stride): PyTorch's channels_last, TensorRT's kHWC, kHWC8 and kHWC16 */
};

enum moe3d_status {
    MOE3D_OK = 0,
    MOE3D_ERROR_NULL = 1,
    MOE3D_ERROR_TYPE = 2,
    MOE3D_ERROR_LAYOUT = 3,
    MOE3D_ERROR_EXPERTS = 4,
    MOE3D_ERROR_WIDTH = 5,
    MOE3D_ERROR_SIZE = 6,
    MOE3D_ERROR_STRIDE = 7,
    MOE3D_ERROR_TEMPERATURE = 8,
    MOE3D_ERROR_ALIGNMENT = 9,
    MOE3D_ERROR_TOO_LARGE = 10,
    MOE3D_ERROR_CUDA = 1000 /* 1000 + e: the CUDA runtime refused the launch with cudaError_t e */
};

struct moe3d_expert_mix_sizes {
    int32_t type;         /* enum moe3d_type */
    int32_t layout;       /* enum moe3d_layout */
    int64_t views;        /* N >= 0; nothing is done where N, H or W is 0 */
    int64_t height;       /* H >= 0, pixels */
    int64_t width;        /* W >= 0, pixels */
    int64_t experts;      /* K, 1 to 16 */
    int64_t expert_width; /* Ce, channels of an expert: a positive multiple of 8 */
    int64_t gate_width;   /* Cg, channels of the gate: a positive multiple of 8 */
    int64_t pixel_stride; /* MOE3D_CHANNELS_LAST: elements from a pixel to the next, a multiple of 8 that is at least
                             C = K Ce + Cg, or 0 for C itself. MOE3D_NCHW: 0 */
    float temperature;    /* finite, at least 1.2e-38 (no subnormal) */
};

struct moe3d_expert_mix_tensors {
    const void* hidden;         /* (N, K Ce + Cg, H, W), after the ReLU; channels last: aligned to 16 bytes */
    const float* expert_weight; /* (K, 2, Ce): row 0 gives the logarithm of the depth, row 1 that of confidence - 1 */
    const float* expert_bias;   /* (K, 2) */
    const float* gate_weight;   /* (K, Cg) */
    const float* gate_bias;     /* (K) */
    float* depth;               /* (N, H, W), in the units of exp(v) */
    float* confidence;          /* (N, H, W), at least 1 */
    float* weights;             /* (N, K, H, W), the gate's softmax; may be null: then it is not written */
};

/* Queues the mix on `stream` (a cudaStream_t of the current device). Returns a moe3d_status, or MOE3D_ERROR_CUDA plus
 * the CUDA runtime's error; everything is checked before anything is queued. */
int moe3d_expert_mix(const struct moe3d_expert_mix_sizes* sizes, const struct moe3d_expert_mix_tensors* tensors,
                     void* stream);

/* MOE3D_ABI_VERSION of the header that the library was compiled with. */
int moe3d_abi_version(void);

/* One line on a status: what is wrong and what was expected. Static text; never null. */
const char* moe3d_error_text(int status);

#ifdef __cplusplus
}
#endif

#endif
