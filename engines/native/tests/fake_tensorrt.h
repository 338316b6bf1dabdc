// What TensorRT brings to a plugin, as far as the harness needs it: a log, dimension expressions, a tensor's
// description.
#pragma once

#include <NvInferRuntime.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <string>
#include <vector>

namespace trt = nvinfer1;

class Log final : public trt::ILogger {
public:
    void log(Severity, const char* message) noexcept override { last = message; }
    std::string last;
};

class Finder final : public trt::ILoggerFinder {
public:
    trt::ILogger* findLogger() override { return &log; }
    Log log;
};

class Expression final : public trt::IDimensionExpr {
public:
    explicit Expression(std::int64_t value) : value_(value) { mImpl = &value_; }

private:
    class Value final : public trt::apiv::VDimensionExpr {
    public:
        explicit Value(std::int64_t value) : value_(value) {}
        bool isConstant() const override { return value_ >= 0; }
        std::int64_t getConstantValue() const override { return value_; }
        bool isSizeTensor() const override { return false; }

    private:
        std::int64_t value_;
    };
    Value value_;
};

class Builder final : public trt::IExprBuilder {
public:
    Builder() { mImpl = &impl_; }

private:
    class Impl final : public trt::apiv::VExprBuilder {
    public:
        const trt::IDimensionExpr* constant(std::int64_t value) override {
            made_.push_back(std::make_unique<Expression>(value));
            return made_.back().get();
        }
        const trt::IDimensionExpr* operation(trt::DimensionOperation, const trt::IDimensionExpr&,
                                             const trt::IDimensionExpr&) override {
            return nullptr;
        }
        const trt::IDimensionExpr* declareSizeTensor(std::int32_t, const trt::IDimensionExpr&,
                                                     const trt::IDimensionExpr&) override {
            return nullptr;
        }

    private:
        std::vector<std::unique_ptr<Expression>> made_;
    };
    Impl impl_;
};

inline trt::Dims dims(std::initializer_list<std::int64_t> sizes) {
    trt::Dims made{};
    for (const std::int64_t size : sizes) made.d[made.nbDims++] = size;
    return made;
}

inline trt::PluginTensorDesc tensor(std::initializer_list<std::int64_t> sizes,
                                    trt::DataType type = trt::DataType::kFLOAT,
                                    trt::TensorFormat format = trt::TensorFormat::kLINEAR) {
    trt::PluginTensorDesc desc{};
    desc.dims = dims(sizes);
    desc.type = type;
    desc.format = format;
    return desc;
}

inline std::vector<trt::DynamicPluginTensorDesc> dynamic(const std::vector<trt::PluginTensorDesc>& descs) {
    std::vector<trt::DynamicPluginTensorDesc> made;
    for (const auto& desc : descs) made.push_back({desc, desc.dims, desc.dims, desc.dims});
    return made;
}
