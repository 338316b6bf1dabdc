// The plugin that the harness drives: its creator, its capabilities, the usual attributes and tensors, what it logged.
#pragma once

#include "fake_tensorrt.h"

inline trt::IPluginCreatorV3One* creator = nullptr;
inline Finder finder;

// An integer attribute as the parser reads it, and a real one.
struct Fields {
    std::int32_t experts = 4;
    float temperature = 0.5f;
    std::int32_t with_weights = 0;
    std::vector<trt::PluginField> fields;
    trt::PluginFieldCollection collection{};

    Fields(std::int32_t experts_, float temperature_, int with_weights_)
        : experts(experts_), temperature(temperature_), with_weights(with_weights_) {
        fields = {{"num_experts", &experts, trt::PluginFieldType::kINT32, 1},
                  {"temperature", &temperature, trt::PluginFieldType::kFLOAT32, 1}};
        if (with_weights_ >= 0) fields.push_back({"with_weights", &with_weights, trt::PluginFieldType::kINT32, 1});
    }
    const trt::PluginFieldCollection* get() {
        collection = {static_cast<std::int32_t>(fields.size()), fields.data()};
        return &collection;
    }
};

using Plugin = std::unique_ptr<trt::IPluginV3>;

inline Plugin make(int experts = 4, float temperature = 0.5f, int with_weights = 0,
                   trt::TensorRTPhase phase = trt::TensorRTPhase::kBUILD) {
    Fields fields(experts, temperature, with_weights);
    return Plugin(creator->createPlugin("mix", fields.get(), phase));
}

inline trt::IPluginV3OneCore* core(const Plugin& plugin) {
    return static_cast<trt::IPluginV3OneCore*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kCORE));
}
inline trt::IPluginV3OneBuild* build(const Plugin& plugin) {
    return static_cast<trt::IPluginV3OneBuild*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kBUILD));
}
inline trt::IPluginV3OneRuntime* runtime(const Plugin& plugin) {
    return static_cast<trt::IPluginV3OneRuntime*>(plugin->getCapabilityInterface(trt::PluginCapabilityType::kRUNTIME));
}

// 4 experts of 32 channels and a gate of 32, fp16, two views of 6 x 7.
inline std::vector<trt::PluginTensorDesc> usual_inputs() {
    return {tensor({2, 160, 6, 7}, trt::DataType::kHALF), tensor({4, 2, 32}), tensor({4, 2}), tensor({4, 32}),
            tensor({4})};
}

inline std::vector<trt::PluginTensorDesc> usual_outputs() {
    return {tensor({2, 6, 7}), tensor({2, 6, 7}), tensor({2, 4, 6, 7})};
}

// In a check: ends it with what did not hold.
#define EXPECT(condition) \
    if (!(condition)) return std::string(#condition) + ", last logged: " + finder.log.last

// Whether the newest message in the log is this plugin's and has `text`; forgets it.
inline bool logged(const std::string& text) {
    const std::string last = std::move(finder.log.last);
    finder.log.last.clear();
    return last.rfind("moe3d::ExpertMix: ", 0) == 0 && last.find(text) != std::string::npos;
}
