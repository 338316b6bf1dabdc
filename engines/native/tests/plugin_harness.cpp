// Drives a built plugin library through its creator as TensorRT would, with neither TensorRT nor a GPU: headers alone.
//
//   moe3d_plugin_harness_trt10 libmoe3d_plugin_trt10.so
//
// Prints a line per check, "ok" or "FAILED"; exit code 1 where one failed. Not shown by it: that TensorRT accepts the
// library, and that a kernel runs.

#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "driven_plugin.h"

namespace {

// Checks: each returns what went wrong, or nothing.

std::string creator_names_the_operator() {
    EXPECT(std::strcmp(creator->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE") == 0);
    EXPECT(std::string(creator->getPluginName()) == "ExpertMix");
    EXPECT(std::string(creator->getPluginVersion()) == "1");
    EXPECT(std::string(creator->getPluginNamespace()).empty());
    const trt::PluginFieldCollection* names = creator->getFieldNames();
    EXPECT(names->nbFields == 3);
    EXPECT(std::string(names->fields[0].name) == "num_experts");
    EXPECT(std::string(names->fields[1].name) == "temperature");
    EXPECT(std::string(names->fields[2].name) == "with_weights");
    return {};
}

std::string plugin_has_its_three_capabilities() {
    const Plugin plugin = make();
    EXPECT(plugin);
    EXPECT(std::strcmp(core(plugin)->getInterfaceInfo().kind, "PLUGIN_V3ONE_CORE") == 0);
    EXPECT(std::strcmp(build(plugin)->getInterfaceInfo().kind, "PLUGIN_V3ONE_BUILD") == 0);
    EXPECT(std::strcmp(runtime(plugin)->getInterfaceInfo().kind, "PLUGIN_V3ONE_RUNTIME") == 0);
    EXPECT(plugin->getCapabilityInterface(static_cast<trt::PluginCapabilityType>(99)) == nullptr);
    EXPECT(std::string(core(plugin)->getPluginName()) == "ExpertMix");
    EXPECT(std::string(core(plugin)->getPluginVersion()) == "1");
    EXPECT(std::string(core(plugin)->getPluginNamespace()).empty());
    return {};
}

std::string wrong_attributes_make_no_plugin() {
    EXPECT(!make(0));
    EXPECT(logged("attribute num_experts is 0; expected a whole number from 1 to 16"));
    EXPECT(!make(17));
    EXPECT(logged("attribute num_experts is 17"));
    EXPECT(!make(4, -1.0f));
    EXPECT(logged("attribute temperature is -1; expected a finite number above 0"));
    EXPECT(!make(4, std::numeric_limits<float>::quiet_NaN()));
    EXPECT(logged("attribute temperature is nan"));
    EXPECT(!make(4, 1.0f, 2));
    EXPECT(logged("attribute with_weights is 2; expected 0 or 1"));
    EXPECT(!Plugin(creator->createPlugin("mix", nullptr, trt::TensorRTPhase::kBUILD)));
    EXPECT(logged("attribute num_experts is missing"));
    Fields fields(4, 1.0f, -1);
    fields.fields[1].type = trt::PluginFieldType::kCHAR;
    EXPECT(!Plugin(creator->createPlugin("mix", fields.get(), trt::TensorRTPhase::kBUILD)));
    EXPECT(logged("attribute temperature is not one number"));
    return {};
}

std::string an_absent_with_weights_means_two_outputs() {
    const Plugin plugin = make(4, 1.0f, -1);
    EXPECT(plugin);
    EXPECT(build(plugin)->getNbOutputs() == 2);
    EXPECT(build(make(4, 1.0f, 1))->getNbOutputs() == 3);
    return {};
}

std::string outputs_are_float32() {
    using T = trt::DataType;
    const Plugin plugin = make(4, 1.0f, 1);
    T types[3];
    for (const T hidden : {T::kFLOAT, T::kHALF, T::kBF16}) {
        const T inputs[] = {hidden, T::kFLOAT, T::kFLOAT, T::kFLOAT, T::kFLOAT};
        std::fill(types, types + 3, T::kINT8);
        EXPECT(build(plugin)->getOutputDataTypes(types, 3, inputs, 5) == 0);
        EXPECT(types[0] == T::kFLOAT && types[1] == T::kFLOAT && types[2] == T::kFLOAT);
    }
    const T integers[] = {T::kINT8, T::kFLOAT, T::kFLOAT, T::kFLOAT, T::kFLOAT};
    EXPECT(build(plugin)->getOutputDataTypes(types, 3, integers, 5) != 0);
    EXPECT(logged("input hidden is neither float32, float16 nor bfloat16"));
    const T half_bias[] = {T::kHALF, T::kFLOAT, T::kHALF, T::kFLOAT, T::kFLOAT};
    EXPECT(build(plugin)->getOutputDataTypes(types, 3, half_bias, 5) != 0);
    EXPECT(logged("input expert_bias is not float32"));
    EXPECT(build(plugin)->getOutputDataTypes(types, 2, half_bias, 5) != 0);
    EXPECT(logged("2 outputs; expected 3 with with_weights=1"));
    EXPECT(build(plugin)->getOutputDataTypes(types, 3, half_bias, 4) != 0);
    EXPECT(logged("4 inputs; expected 5"));
    return {};
}

std::string output_shapes_follow_the_map() {
    const Plugin plugin = make(4, 1.0f, 1);
    Builder builder;
    const Expression n(-1), channels(160), h(-1), w(-1), other(4);
    trt::DimsExprs inputs[5]{};
    inputs[0] = {4, {&n, &channels, &h, &w}};
    for (int i = 1; i < 5; ++i) inputs[i] = {1, {&other}};
    trt::DimsExprs outputs[3]{};
    EXPECT(build(plugin)->getOutputShapes(inputs, 5, nullptr, 0, outputs, 3, builder) == 0);
    for (int i = 0; i < 2; ++i) {
        EXPECT(outputs[i].nbDims == 3);
        EXPECT(outputs[i].d[0] == &n && outputs[i].d[1] == &h && outputs[i].d[2] == &w);
    }
    EXPECT(outputs[2].nbDims == 4);
    EXPECT(outputs[2].d[0] == &n && outputs[2].d[2] == &h && outputs[2].d[3] == &w);
    EXPECT(outputs[2].d[1]->isConstant() && outputs[2].d[1]->getConstantValue() == 4);
    inputs[0].nbDims = 5;
    EXPECT(build(plugin)->getOutputShapes(inputs, 5, nullptr, 0, outputs, 3, builder) != 0);
    EXPECT(logged("input hidden has 5 dimensions; expected 4"));
    EXPECT(build(plugin)->getOutputShapes(inputs, 5, nullptr, 0, outputs, 2, builder) != 0);
    EXPECT(logged("2 outputs; expected 3"));
    return {};
}

std::string formats_are_those_with_a_kernel() {
    using T = trt::DataType;
    using F = trt::TensorFormat;
    const Plugin plugin = make(4, 1.0f, 1);
    auto tensors = dynamic(usual_inputs());
    for (const auto& desc : dynamic(usual_outputs())) tensors.push_back(desc);
    const auto taken = [&](int position, T type, F format) {
        tensors[position].desc.type = type;
        tensors[position].desc.format = format;
        return build(plugin)->supportsFormatCombination(position, tensors.data(), 5, 3);
    };
    int combinations = 0;
    for (int type = 0; type < 10; ++type) {
        for (int format = 0; format < 13; ++format)
            combinations += taken(0, static_cast<T>(type), static_cast<F>(format));
    }
    EXPECT(combinations == 7);
    for (const T type : {T::kFLOAT, T::kHALF, T::kBF16}) EXPECT(taken(0, type, F::kLINEAR));
    EXPECT(taken(0, T::kFLOAT, F::kHWC));
    EXPECT(taken(0, T::kHALF, F::kHWC8));
    EXPECT(taken(0, T::kBF16, F::kHWC8));
    EXPECT(taken(0, T::kHALF, F::kHWC16));
    for (int position = 1; position < 8; ++position) {
        combinations = 0;
        for (int type = 0; type < 10; ++type) {
            for (int format = 0; format < 13; ++format) {
                combinations += taken(position, static_cast<T>(type), static_cast<F>(format));
            }
        }
        EXPECT(combinations == 1);
        EXPECT(taken(position, T::kFLOAT, F::kLINEAR));
    }
    EXPECT(!build(plugin)->supportsFormatCombination(8, tensors.data(), 5, 3));
    EXPECT(!build(plugin)->supportsFormatCombination(0, tensors.data(), 5, 2));
    EXPECT(!build(plugin)->supportsFormatCombination(0, tensors.data(), 4, 3));
    return {};
}

std::string configuration_checks_the_largest_shapes() {
    const Plugin plugin = make();
    auto inputs = dynamic(usual_inputs());
    const auto outputs = dynamic(usual_outputs());
    inputs[0].desc.dims = dims({-1, 160, -1, -1});  // as while a network with open shapes is built
    EXPECT(build(plugin)->configurePlugin(inputs.data(), 5, outputs.data(), 2) == 0);
    inputs[0].max = dims({2, 128, 6, 7});
    EXPECT(build(plugin)->configurePlugin(inputs.data(), 5, outputs.data(), 2) != 0);
    EXPECT(
        logged("input hidden is (2, 128, 6, 7); expected (N, 160, H, W), 4 experts of 32 channels and a gate of 32"));
    EXPECT(build(plugin)->configurePlugin(inputs.data(), 5, outputs.data(), 3) != 0);
    EXPECT(logged("3 outputs; expected 2"));
    EXPECT(build(plugin)->configurePlugin(inputs.data(), 4, outputs.data(), 2) != 0);
    EXPECT(logged("4 inputs; expected 5"));
    return {};
}

std::string no_workspace_and_no_tactics_are_asked_for() {
    const Plugin plugin = make();
    const auto inputs = dynamic(usual_inputs());
    const auto outputs = dynamic(usual_outputs());
    EXPECT(build(plugin)->getWorkspaceSize(inputs.data(), 5, outputs.data(), 2) == 0);
    EXPECT(build(plugin)->getNbTactics() == 0);
    return {};
}

std::string timings_are_cached_by_what_changes_the_kernel() {
    EXPECT(std::string(build(make())->getTimingCacheID()) == "moe3d-ExpertMix-K4-weights0-revision1");
    EXPECT(std::string(build(make(5))->getTimingCacheID()) == "moe3d-ExpertMix-K5-weights0-revision1");
    EXPECT(std::string(build(make(4, 0.5f, 1))->getTimingCacheID()) == "moe3d-ExpertMix-K4-weights1-revision1");
    return {};
}

std::string shape_changes_are_checked() {
    const Plugin plugin = make();
    auto inputs = usual_inputs();
    const auto outputs = usual_outputs();
    EXPECT(runtime(plugin)->onShapeChange(inputs.data(), 5, outputs.data(), 2) == 0);
    inputs[3] = tensor({4, 20});
    EXPECT(runtime(plugin)->onShapeChange(inputs.data(), 5, outputs.data(), 2) != 0);
    EXPECT(logged("input gate_weight is (4, 20); expected (4, Cg) with Cg a multiple of 8"));
    EXPECT(runtime(plugin)->onShapeChange(inputs.data(), 3, outputs.data(), 2) != 0);
    EXPECT(logged("3 inputs; expected 5"));
    return {};
}

std::string an_engine_brings_the_same_plugin_back() {
    Plugin first = make(7, 0.25f, 1);
    const trt::PluginFieldCollection* fields = runtime(first)->getFieldsToSerialize();
    EXPECT(fields && fields->nbFields == 3);
    const Plugin again(creator->createPlugin("mix", fields, trt::TensorRTPhase::kRUNTIME));
    EXPECT(again);
    first.reset();  // the new one holds values of its own
    EXPECT(std::string(build(again)->getMetadataString()) == "num_experts=7 temperature=0.250000 with_weights=1");
    EXPECT(build(again)->getNbOutputs() == 3);
    fields = runtime(again)->getFieldsToSerialize();
    EXPECT(*static_cast<const std::int32_t*>(fields->fields[0].data) == 7);
    EXPECT(*static_cast<const float*>(fields->fields[1].data) == 0.25f);
    EXPECT(*static_cast<const std::int32_t*>(fields->fields[2].data) == 1);
    return {};
}

std::string clones_stand_alone() {
    for (const bool context : {false, true}) {
        Plugin first = make(3, 2.0f, 1);
        const Plugin copy(context ? runtime(first)->attachToContext(nullptr) : first->clone());
        EXPECT(copy && copy.get() != first.get());
        first.reset();
        EXPECT(std::string(build(copy)->getMetadataString()) == "num_experts=3 temperature=2.000000 with_weights=1");
        const trt::PluginFieldCollection* fields = runtime(copy)->getFieldsToSerialize();
        EXPECT(*static_cast<const std::int32_t*>(fields->fields[0].data) == 3);
    }
    return {};
}

std::string wrong_launches_are_refused_before_a_device_is_needed() {
    const Plugin plugin = make();
    auto inputs = usual_inputs();
    const auto outputs = usual_outputs();
    const void* in[5] = {};
    void* out[2] = {};
    const auto enqueue = [&] {
        return runtime(plugin)->enqueue(inputs.data(), outputs.data(), in, out, nullptr, nullptr);
    };
    EXPECT(enqueue() != 0);
    EXPECT(logged("a required pointer is null"));
    alignas(16) static char memory[64];
    for (auto& pointer : in) pointer = memory;
    for (auto& pointer : out) pointer = memory;
    in[0] = memory + 1;
    EXPECT(enqueue() != 0);
    EXPECT(logged("a pointer is misaligned"));
    in[0] = memory;
    inputs[0] = tensor({2, 152, 6, 7}, trt::DataType::kHALF);
    EXPECT(enqueue() != 0);
    EXPECT(logged("input hidden is (2, 152, 6, 7); expected (N, 160, H, W)"));
    inputs[0] = tensor({2, 160, 6, 7}, trt::DataType::kINT8);
    EXPECT(enqueue() != 0);
    EXPECT(logged("type or format"));
    return {};
}

std::string an_empty_map_is_a_finished_launch() {
    const Plugin plugin = make();
    auto inputs = usual_inputs();
    inputs[0] = tensor({0, 160, 6, 7}, trt::DataType::kHALF);
    const void* in[5] = {};
    void* out[2] = {};
    const auto outputs = usual_outputs();
    EXPECT(runtime(plugin)->enqueue(inputs.data(), outputs.data(), in, out, nullptr, nullptr) == 0);
    return {};
}

// Whether a kernel could start here, and would then write through the harness's pointers.
bool has_device() {
    void* const driver = dlopen("libcuda.so.1", RTLD_NOW);
    if (!driver) return false;
    const auto initialise = reinterpret_cast<int (*)(unsigned)>(dlsym(driver, "cuInit"));
    return initialise && initialise(0) == 0;
}

std::string a_launch_that_cuda_refuses_is_logged() {
    if (has_device()) {
        std::printf("note: there is a CUDA device, so no launch is tried that has to fail\n");
        return {};
    }
    const Plugin plugin = make();
    const auto inputs = usual_inputs();
    const auto outputs = usual_outputs();
    alignas(16) static char memory[64];
    const void* in[5];
    void* out[2];
    for (auto& pointer : in) pointer = memory;
    for (auto& pointer : out) pointer = memory;
    EXPECT(runtime(plugin)->enqueue(inputs.data(), outputs.data(), in, out, nullptr, nullptr) != 0);
    EXPECT(logged("CUDA"));
    return {};
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 2) {
        std::fprintf(stderr, "usage: %s PLUGIN.so\n", argv[0]);
        return 2;
    }
    void* const plugin_file = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);  // RTLD_NOW: every symbol has to be there
    if (!plugin_file) {
        std::fprintf(stderr, "%s\n", dlerror());
        return 1;
    }
    using GetCreators = trt::IPluginCreatorInterface* const* (*)(std::int32_t&);
    using SetLoggerFinder = void (*)(trt::ILoggerFinder*);
    const auto get_creators = reinterpret_cast<GetCreators>(dlsym(plugin_file, "getCreators"));
    const auto set_logger_finder = reinterpret_cast<SetLoggerFinder>(dlsym(plugin_file, "setLoggerFinder"));
    if (!get_creators || !set_logger_finder) {
        std::fprintf(stderr, "%s does not export getCreators and setLoggerFinder\n", argv[1]);
        return 1;
    }
    std::int32_t count = 0;
    trt::IPluginCreatorInterface* const* const creators = get_creators(count);
    if (count != 1) {
        std::fprintf(stderr, "%d creators; expected 1\n", count);
        return 1;
    }
    creator = static_cast<trt::IPluginCreatorV3One*>(creators[0]);
    make(0);  // an error before there is a log is no crash
    set_logger_finder(&finder);

    const std::pair<const char*, std::function<std::string()>> checks[] = {
#define CHECK(name) {#name, name}
        CHECK(creator_names_the_operator),
        CHECK(plugin_has_its_three_capabilities),
        CHECK(wrong_attributes_make_no_plugin),
        CHECK(an_absent_with_weights_means_two_outputs),
        CHECK(outputs_are_float32),
        CHECK(output_shapes_follow_the_map),
        CHECK(formats_are_those_with_a_kernel),
        CHECK(configuration_checks_the_largest_shapes),
        CHECK(no_workspace_and_no_tactics_are_asked_for),
        CHECK(timings_are_cached_by_what_changes_the_kernel),
        CHECK(shape_changes_are_checked),
        CHECK(an_engine_brings_the_same_plugin_back),
        CHECK(clones_stand_alone),
        CHECK(wrong_launches_are_refused_before_a_device_is_needed),
        CHECK(an_empty_map_is_a_finished_launch),
        CHECK(a_launch_that_cuda_refuses_is_logged),
    };
    int failed = 0;
    for (const auto& [name, check] : checks) {
        finder.log.last.clear();
        const std::string problem = check();
        std::printf("%s: %s%s%s\n", problem.empty() ? "ok" : "FAILED", name, problem.empty() ? "" : ": ",
                    problem.c_str());
        failed += !problem.empty();
    }
    std::printf("headers of TensorRT %d.%d: %zu checks, %d failed\n", NV_TENSORRT_MAJOR, NV_TENSORRT_MINOR,
                std::size(checks), failed);
    set_logger_finder(nullptr);
    return failed ? 1 : 0;
}
