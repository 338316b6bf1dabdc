// moe3d::ExpertMix as a TensorRT plugin: TensorRT's types translated to expert_mix_rules.h, the launch left to the C
// entry. One source for TensorRT 10.3 to 11; a library serves the major version of the headers it was compiled with.
//
// Exports getCreators and setLoggerFinder, which TensorRT looks up in a plugin library, and a name that says which major
// version it is for; uses no symbol of TensorRT.

#include <NvInferRuntime.h>

#include <atomic>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "expert_mix_rules.h"

namespace moe3d {
namespace {

namespace trt = nvinfer1;

std::atomic<trt::ILoggerFinder*> logger_finder{nullptr};

// A plugin can only return a code; the reason goes to TensorRT's log. Without a log there is nobody to tell.
int report(const std::string& error) noexcept {
    trt::ILoggerFinder* const finder = logger_finder.load();
    trt::ILogger* const logger = finder ? finder->findLogger() : nullptr;
    if (logger) logger->log(trt::ILogger::Severity::kERROR, ("moe3d::ExpertMix: " + error).c_str());
    return 1;
}

// f(), whose text is an error: 0, or a non-zero code and the text in the log. No exception leaves the plugin.
template <class F>
int guarded(const F& f) noexcept {
    try {
        const std::string error = f();
        return error.empty() ? 0 : report(error);
    } catch (const std::exception&) {  // memory alone is allocated
        return 1;
    }
}

int type_of(trt::DataType type) noexcept {
    switch (type) {
        case trt::DataType::kFLOAT: return MOE3D_FLOAT32;
        case trt::DataType::kHALF: return MOE3D_FLOAT16;
        case trt::DataType::kBF16: return MOE3D_BFLOAT16;
        default: return kOtherType;
    }
}

Format format_of(trt::TensorFormat format) noexcept {
    switch (format) {
        case trt::TensorFormat::kLINEAR: return Format::kLinear;
        case trt::TensorFormat::kHWC: return Format::kHwc;
        case trt::TensorFormat::kHWC8: return Format::kHwc8;
        case trt::TensorFormat::kHWC16: return Format::kHwc16;
        default: return Format::kOther;
    }
}

Shape shape_of(const trt::Dims& dims) noexcept {
    Shape shape{dims.nbDims < 0 ? 0 : dims.nbDims, {}};
    for (int i = 0; i < shape.rank && i < trt::Dims::MAX_DIMS; ++i) shape.size[i] = dims.d[i];
    return shape;
}

FieldType field_type_of(trt::PluginFieldType type) noexcept {
    switch (type) {
        case trt::PluginFieldType::kINT32: return FieldType::kInt32;
        case trt::PluginFieldType::kINT64: return FieldType::kInt64;
        case trt::PluginFieldType::kFLOAT32: return FieldType::kFloat32;
        case trt::PluginFieldType::kFLOAT64: return FieldType::kFloat64;
        default: return FieldType::kOther;
    }
}

// The sizes of a launch, or the error. `dims` gives the dimensions of input i.
template <class Dims>
std::string sizes_of(const trt::PluginTensorDesc& hidden, const Dims& dims, const Attributes& attributes,
                     Sizes* sizes) {
    Shape shapes[kInputs];
    for (int i = 0; i < kInputs; ++i) shapes[i] = shape_of(dims(i));
    return read_sizes(shapes, type_of(hidden.type), format_of(hidden.format), attributes, sizes);
}

class ExpertMix final : public trt::IPluginV3,
                        public trt::IPluginV3OneCore,
                        public trt::IPluginV3OneBuild,
                        public trt::IPluginV3OneRuntime {
public:
    explicit ExpertMix(const Attributes& attributes)
        : attributes_(attributes),
          timing_id_(timing_id(attributes)),
          description_(describe(attributes)),
          fields_{{kNumExperts, &attributes_.num_experts, trt::PluginFieldType::kINT32, 1},
                  {kTemperature, &attributes_.temperature, trt::PluginFieldType::kFLOAT32, 1},
                  {kWithWeights, &attributes_.with_weights, trt::PluginFieldType::kINT32, 1}},
          collection_{3, fields_} {}

    ExpertMix(const ExpertMix&) = delete;  // fields_ points into the object: clone()
    ExpertMix& operator=(const ExpertMix&) = delete;

    // --- IPluginV3

    trt::IPluginCapability* getCapabilityInterface(trt::PluginCapabilityType type) noexcept override {
        switch (type) {
            case trt::PluginCapabilityType::kCORE: return static_cast<trt::IPluginV3OneCore*>(this);
            case trt::PluginCapabilityType::kBUILD: return static_cast<trt::IPluginV3OneBuild*>(this);
            case trt::PluginCapabilityType::kRUNTIME: return static_cast<trt::IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    trt::IPluginV3* clone() noexcept override {
        try {
            return new ExpertMix(attributes_);
        } catch (const std::bad_alloc&) {
            return nullptr;
        }
    }

    // --- core

    const char* getPluginName() const noexcept override { return kOperatorName; }
    const char* getPluginVersion() const noexcept override { return kOperatorVersion; }
    const char* getPluginNamespace() const noexcept override { return kOperatorNamespace; }

    // --- build

    int32_t getNbOutputs() const noexcept override { return outputs(attributes_); }

    int32_t getOutputDataTypes(trt::DataType* types, int32_t count, const trt::DataType* inputs,
                               int32_t input_count) const noexcept override {
        return guarded([&]() -> std::string {
            if (std::string error = check_counts(input_count, count, attributes_); !error.empty()) return error;
            if (type_of(inputs[0]) == kOtherType) return "input hidden is neither float32, float16 nor bfloat16";
            for (int i = 1; i < kInputs; ++i) {
                if (inputs[i] == trt::DataType::kFLOAT) continue;
                return std::string("input ") + kInputNames[i] + " is not float32";
            }
            for (int i = 0; i < count; ++i) types[i] = trt::DataType::kFLOAT;
            return {};
        });
    }

    int32_t getOutputShapes(const trt::DimsExprs* inputs, int32_t input_count, const trt::DimsExprs*, int32_t,
                            trt::DimsExprs* shapes, int32_t count, trt::IExprBuilder& build) noexcept override {
        return guarded([&]() -> std::string {
            if (std::string error = check_counts(input_count, count, attributes_); !error.empty()) return error;
            if (inputs[0].nbDims != 4) {
                return "input hidden has " + std::to_string(inputs[0].nbDims) + " dimensions; expected 4";
            }
            for (int output = 0; output < count; ++output) {
                const bool is_map = output < 2;
                shapes[output].nbDims = is_map ? 3 : 4;
                for (int i = 0; i < shapes[output].nbDims; ++i) {
                    const int axis = is_map ? kMapAxes[i] : kWeightsAxes[i];
                    shapes[output].d[i] =
                        axis == kExpertsAxis ? build.constant(attributes_.num_experts) : inputs[0].d[axis];
                }
            }
            return {};
        });
    }

    bool supportsFormatCombination(int32_t position, const trt::DynamicPluginTensorDesc* tensors, int32_t input_count,
                                   int32_t output_count) noexcept override {
        if (input_count != kInputs || output_count != outputs(attributes_)) return false;
        if (position < 0 || position >= input_count + output_count) return false;
        const trt::PluginTensorDesc& tensor = tensors[position].desc;
        return supports(position, type_of(tensor.type), format_of(tensor.format), attributes_);
    }

    int32_t configurePlugin(const trt::DynamicPluginTensorDesc* inputs, int32_t input_count,
                            const trt::DynamicPluginTensorDesc*, int32_t output_count) noexcept override {
        return guarded([&]() -> std::string {
            if (std::string error = check_counts(input_count, output_count, attributes_); !error.empty()) return error;
            Sizes sizes;
            return sizes_of(
                inputs[0].desc, [&](int i) -> const trt::Dims& { return inputs[i].max; }, attributes_, &sizes);
        });
    }

    const char* getTimingCacheID() noexcept override { return timing_id_.c_str(); }

    const char* getMetadataString() noexcept override { return description_.c_str(); }

    // --- runtime

    int32_t onShapeChange(const trt::PluginTensorDesc* inputs, int32_t input_count, const trt::PluginTensorDesc*,
                          int32_t output_count) noexcept override {
        return guarded([&]() -> std::string {
            if (std::string error = check_counts(input_count, output_count, attributes_); !error.empty()) return error;
            Sizes sizes;
            return sizes_of(inputs[0], [&](int i) -> const trt::Dims& { return inputs[i].dims; }, attributes_, &sizes);
        });
    }

    // Allocates only where it has an error to report.
    int32_t enqueue(const trt::PluginTensorDesc* inputs, const trt::PluginTensorDesc*, const void* const* in,
                    void* const* out, void*, cudaStream_t stream) noexcept override {
        return guarded([&]() -> std::string {
            Sizes sizes;
            std::string error =
                sizes_of(inputs[0], [&](int i) -> const trt::Dims& { return inputs[i].dims; }, attributes_, &sizes);
            if (!error.empty()) return error;
            const auto floats = [&](int i) { return static_cast<const float*>(in[i]); };
            const auto result = [&](int i) { return static_cast<float*>(out[i]); };
            float* const weights = attributes_.with_weights ? result(2) : nullptr;
            const Tensors tensors{in[0], floats(1), floats(2), floats(3), floats(4), result(0), result(1), weights};
            const int status = moe3d_expert_mix(&sizes, &tensors, stream);
            return status ? moe3d_error_text(status) : std::string();
        });
    }

    trt::IPluginV3* attachToContext(trt::IPluginResourceContext*) noexcept override { return clone(); }

    const trt::PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    Attributes attributes_;
    std::string timing_id_;
    std::string description_;
    trt::PluginField fields_[3];  // point into attributes_
    trt::PluginFieldCollection collection_;
};

class ExpertMixCreator final : public trt::IPluginCreatorV3One {
public:
    // The same attributes from the network (build) and from an engine (runtime).
    trt::IPluginV3* createPlugin(const char*, const trt::PluginFieldCollection* fields,
                                 trt::TensorRTPhase) noexcept override {
        std::unique_ptr<ExpertMix> plugin;
        guarded([&]() -> std::string {
            std::vector<Field> read;
            const int count = fields ? fields->nbFields : 0;
            for (int i = 0; i < count; ++i) {
                const trt::PluginField& field = fields->fields[i];
                read.push_back({field.name, field_type_of(field.type), field.data, field.length});
            }
            Attributes attributes;
            std::string error = read_fields(read.data(), count, &attributes);
            if (error.empty()) plugin = std::make_unique<ExpertMix>(attributes);
            return error;
        });
        return plugin.release();
    }

    const trt::PluginFieldCollection* getFieldNames() noexcept override { return &names_; }
    const char* getPluginName() const noexcept override { return kOperatorName; }
    const char* getPluginVersion() const noexcept override { return kOperatorVersion; }
    const char* getPluginNamespace() const noexcept override { return kOperatorNamespace; }

private:
    trt::PluginField fields_[3] = {{kNumExperts, nullptr, trt::PluginFieldType::kINT32, 1},
                                   {kTemperature, nullptr, trt::PluginFieldType::kFLOAT32, 1},
                                   {kWithWeights, nullptr, trt::PluginFieldType::kINT32, 1}};
    trt::PluginFieldCollection names_{3, fields_};
};

}  // namespace
}  // namespace moe3d

extern "C" nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
    static moe3d::ExpertMixCreator creator;
    static nvinfer1::IPluginCreatorInterface* const creators[] = {&creator};
    count = 1;
    return creators;
}

// The name alone is read, from the file, before anything of the library runs: moe3d_deploy/trt/plugin_library.py.
#define MOE3D_FOR_MAJOR(major) moe3d_plugin_for_tensorrt_##major
#define MOE3D_FOR(major) MOE3D_FOR_MAJOR(major)
extern "C" const int MOE3D_FOR(NV_TENSORRT_MAJOR);
extern "C" const int MOE3D_FOR(NV_TENSORRT_MAJOR) = NV_TENSORRT_MAJOR;

extern "C" void setLoggerFinder(nvinfer1::ILoggerFinder* finder) { moe3d::logger_finder = finder; }
