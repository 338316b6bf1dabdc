// The kernels' own code run on the CPU, block after block, and the rules beside it, for tests through a C interface.
// What runs there but not here: accesses of several bytes, the barrier, and the shuffle that carries values between
// lanes.

#include <cstring>
#include <vector>

#include "../plugin/expert_mix_channels_last.cuh"
#include "../plugin/expert_mix_planar.cuh"
#include "../plugin/expert_mix_rules.h"
#include "../plugin/expert_mix_variants.h"

namespace {

// Where the kernel has its shared memory: exactly as much as the plan asks for.
template <bool InShared, class T>
moe3d::SmallOperands<InShared> small_operands(const moe3d::Operands<T>& o, const moe3d::Plan& plan,
                                              std::vector<float>& shared) {
    if constexpr (InShared) {
        shared.assign(plan.shared_bytes / sizeof(float), 0.0f);
        for (int thread = 0; thread < plan.threads; ++thread) copy_to_shared(o, shared.data(), thread, plan.threads);
        return in_shared(o, shared.data());
    } else {
        return in_place(o);
    }
}

template <class V>
int run(const moe3d::Sizes& sizes, const moe3d::Tensors& tensors, const moe3d::Plan& plan) {
    const auto o = moe3d::operands<typename V::T>(sizes, tensors, plan);
    std::vector<float> shared;
    const auto small = small_operands<V::kInShared>(o, plan, shared);
    for (std::int64_t block = 0; block < plan.blocks; ++block) {
        if constexpr (V::kLayout == MOE3D_CHANNELS_LAST) {
            for (int thread = 0; thread < plan.threads; thread += moe3d::kGroup) {
                const std::int64_t first = block * plan.threads + thread;
                moe3d::channels_last_group<typename V::T, V::kMaxExperts>(o, small, first, moe3d::AllLanes{});
            }
        } else {
            for (int thread = 0; thread < plan.threads; ++thread) {
                moe3d::planar_thread<typename V::T, V::kPixelsPerThread, V::kMaxExperts>(
                    o, small, static_cast<std::uint32_t>(block), thread);
            }
        }
    }
    return MOE3D_OK;
}

int copy_text(const std::string& text, char* to, int size) {
    std::snprintf(to, size, "%s", text.c_str());
    return text.empty() ? 0 : 1;
}

}  // namespace

extern "C" {

int host_mix(const moe3d_expert_mix_sizes* sizes, const moe3d_expert_mix_tensors* tensors) {
    moe3d::Plan plan;
    if (const int status = moe3d::make_plan(*sizes, *tensors, &plan)) return status;
    if (plan.blocks == 0) return MOE3D_OK;
    return moe3d::with_variant(*sizes, plan,
                               [&](auto variant) { return run<decltype(variant)>(*sizes, *tensors, plan); });
}

// plan: pixels_per_thread, experts_bound, weights_in_shared, shared_bytes, threads, blocks, blocks_per_view,
// pixel_stride
int host_plan(const moe3d_expert_mix_sizes* sizes, const moe3d_expert_mix_tensors* tensors, std::int64_t* plan) {
    moe3d::Plan made;
    if (const int status = moe3d::make_plan(*sizes, *tensors, &made)) return status;
    const std::int64_t numbers[] = {made.pixels_per_thread, made.experts_bound, made.weights_in_shared,
                                    made.shared_bytes,      made.threads,       made.blocks,
                                    made.blocks_per_view,   made.pixel_stride};
    std::memcpy(plan, numbers, sizeof numbers);
    return MOE3D_OK;
}

const char* host_status_text(int status) { return moe3d::status_text(status); }

void host_to_float(const std::uint16_t* bits, int brain, float* to, int count) {
    for (int i = 0; i < count; ++i) {
        to[i] = brain ? moe3d::to_float(moe3d::BFloat16{bits[i]}) : moe3d::to_float(moe3d::Half{bits[i]});
    }
}

// kinds: FieldType of every field. Returns 0, or 1 with the error.
int host_read_fields(const char* const* names, const int* kinds, const void* const* data, const int* lengths, int count,
                     double* attributes, char* error, int error_size) {
    std::vector<moe3d::Field> fields;
    for (int i = 0; i < count; ++i) {
        fields.push_back({names[i], static_cast<moe3d::FieldType>(kinds[i]), data[i], lengths[i]});
    }
    moe3d::Attributes read;
    const std::string text = moe3d::read_fields(fields.data(), count, &read);
    attributes[0] = read.num_experts;
    attributes[1] = read.temperature;
    attributes[2] = read.with_weights;
    return copy_text(text, error, error_size);
}

int host_supports(int position, int type, int format, int with_weights) {
    return moe3d::supports(position, type, static_cast<moe3d::Format>(format), {4, 1.0f, with_weights});
}

int host_check_counts(int inputs, int outputs, int with_weights, char* error, int error_size) {
    return copy_text(moe3d::check_counts(inputs, outputs, {4, 1.0f, with_weights}), error, error_size);
}

// ranks and sizes (8 a shape) of the inputs. Returns 0, or 1 with the error.
int host_read_sizes(const int* ranks, const std::int64_t* sizes, int type, int format, int experts,
                    moe3d_expert_mix_sizes* read, char* error, int error_size) {
    moe3d::Shape shapes[moe3d::kInputs];
    for (int i = 0; i < moe3d::kInputs; ++i) {
        shapes[i].rank = ranks[i];
        std::memcpy(shapes[i].size, sizes + 8 * i, sizeof shapes[i].size);
    }
    const std::string text =
        moe3d::read_sizes(shapes, type, static_cast<moe3d::Format>(format), {experts, 1.0f, 0}, read);
    return copy_text(text, error, error_size);
}

void host_timing_id(int experts, float temperature, int with_weights, char* id, int size) {
    copy_text(moe3d::timing_id({experts, temperature, with_weights}), id, size);
}
}
