// Runs every kernel's code in buffers of exactly the tensors' sizes, for a build with AddressSanitizer. Fails as well
// where an output was not written.

#include <cmath>
#include <cstdio>

#include "host_mix.cpp"

namespace {

struct Case {
    std::int64_t views, height, width, experts, expert_width, gate_width, padding;
};

// Whether the mix ran and wrote everything.
bool mix(const Case& c, int type, int layout, bool with_weights) {
    moe3d_expert_mix_sizes sizes{};
    sizes.type = type;
    sizes.layout = layout;
    sizes.views = c.views;
    sizes.height = c.height;
    sizes.width = c.width;
    sizes.experts = c.experts;
    sizes.expert_width = c.expert_width;
    sizes.gate_width = c.gate_width;
    sizes.temperature = 1.0f;
    const std::int64_t channels = moe3d::channels(sizes);
    const std::int64_t pixels = c.views * c.height * c.width;
    const bool last = layout == MOE3D_CHANNELS_LAST;
    sizes.pixel_stride = last ? channels + c.padding : 0;

    std::vector<char> hidden(pixels * (last ? channels + c.padding : channels) * moe3d::element_bytes(type));
    const auto floats = [](std::int64_t count) { return std::vector<float>(count, NAN); };
    const std::vector<float> expert_weight(2 * c.experts * c.expert_width), expert_bias(2 * c.experts);
    const std::vector<float> gate_weight(c.experts * c.gate_width), gate_bias(c.experts);
    std::vector<float> depth = floats(pixels), confidence = floats(pixels), weights = floats(c.experts * pixels);
    const moe3d_expert_mix_tensors tensors{
        hidden.data(),    expert_weight.data(), expert_bias.data(), gate_weight.data(),
        gate_bias.data(), depth.data(),         confidence.data(),  with_weights ? weights.data() : nullptr};
    if (host_mix(&sizes, &tensors) != MOE3D_OK) return false;
    for (const float value : depth) {  // all zeros in: log depths and log (confidence - 1) are 0
        if (!(std::fabs(value - 1.0f) < 1e-6f)) return false;
    }
    for (const float value : confidence) {
        if (!(std::fabs(value - 2.0f) < 1e-6f)) return false;
    }
    for (const float value : weights) {
        if (with_weights && !(std::fabs(value * c.experts - 1.0f) < 1e-6f)) return false;
    }
    return true;
}

}  // namespace

int main() {
    int done = 0;
    for (const std::int64_t experts : {1, 2, 4, 5, 8, 9, 16}) {
        const Case cases[] = {{1, 1, 1, experts, 8, 8, 0},
                              {2, 3, 5, experts, 8, 16, 8},
                              {3, 2, 6, experts, 16, 8, 0},
                              {1, 16, 33, experts, 8, 8, 16},
                              {2, 1, 130, experts, 24, 8, 8}};
        for (const Case& c : cases) {
            for (const int type : {MOE3D_FLOAT32, MOE3D_FLOAT16, MOE3D_BFLOAT16}) {
                for (const int layout : {MOE3D_NCHW, MOE3D_CHANNELS_LAST}) {
                    for (const bool with_weights : {false, true}) {
                        if (!mix(c, type, layout, with_weights)) {
                            std::printf("failed: %d experts, type %d, layout %d\n", static_cast<int>(experts), type,
                                        layout);
                            return 1;
                        }
                        ++done;
                    }
                }
            }
        }
    }
    // Small operands above 48 KiB are read where they are.
    for (const int type : {MOE3D_FLOAT32, MOE3D_FLOAT16, MOE3D_BFLOAT16}) {
        for (const int layout : {MOE3D_NCHW, MOE3D_CHANNELS_LAST}) {
            if (!mix({2, 3, 3, 7, 800, 800, 0}, type, layout, true)) return 1;
            ++done;
        }
    }
    std::printf("%d mixes within bounds\n", done);
}
