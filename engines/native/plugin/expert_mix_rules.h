// What the operator moe3d::ExpertMix, version 1, accepts from an inference engine: attributes, types and formats,
// shapes. Needs neither TensorRT nor CUDA; the TensorRT plugin only translates its types to these.
//
// Functions that return text return what is wrong with which input and what was expected, or nothing.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <string>

#include "expert_mix_launch.h"

namespace moe3d {

constexpr const char* kOperatorName = "ExpertMix";
constexpr const char* kOperatorVersion = "1";
constexpr const char* kOperatorNamespace = "";

// Inputs in order; depth and confidence, then the optional weights, follow as outputs.
constexpr const char* kInputNames[] = {"hidden", "expert_weight", "expert_bias", "gate_weight", "gate_bias"};
constexpr int kInputs = 5;

// --- attributes

struct Attributes {
    std::int32_t num_experts = 0;
    float temperature = 0.0f;
    std::int32_t with_weights = 0;  // 1: the gate's weights are a third output
};

constexpr const char* kNumExperts = "num_experts";
constexpr const char* kTemperature = "temperature";
constexpr const char* kWithWeights = "with_weights";  // may be missing: 0

constexpr int outputs(const Attributes& attributes) { return attributes.with_weights ? 3 : 2; }

enum class FieldType { kInt32, kInt64, kFloat32, kFloat64, kOther };

struct Field {
    const char* name;
    FieldType type;
    const void* data;
    int length;  // elements
};

// A field's one number. False where it holds none, or is not a number.
inline bool read_number(const Field& field, double* number) {
    if (field.length != 1 || !field.data) return false;
    const auto read = [&](auto value) {
        std::memcpy(&value, field.data, sizeof value);
        *number = static_cast<double>(value);
        return true;
    };
    switch (field.type) {
        case FieldType::kInt32: return read(std::int32_t{});
        case FieldType::kInt64: return read(std::int64_t{});
        case FieldType::kFloat32: return read(float{});
        case FieldType::kFloat64: return read(double{});
        default: return false;
    }
}

inline std::string read_fields(const Field* fields, int count, Attributes* attributes) {
    const auto number_text = [](double number) {
        std::string text = std::to_string(number);
        while (text.back() == '0') text.pop_back();
        if (text.back() == '.') text.pop_back();
        return text;
    };
    double experts = 0.0;
    double temperature = 0.0;
    double with_weights = 0.0;
    bool has_experts = false;
    bool has_temperature = false;
    for (int i = 0; i < count; ++i) {
        const std::string name = fields[i].name ? fields[i].name : "";
        double* target = nullptr;
        if (name == kNumExperts) target = &experts, has_experts = true;
        if (name == kTemperature) target = &temperature, has_temperature = true;
        if (name == kWithWeights) target = &with_weights;
        if (name == "plugin_version" || name == "plugin_namespace") continue;  // they chose this plugin already
        if (!target) return "unknown attribute '" + name + "'; expected num_experts, temperature, with_weights";
        if (!read_number(fields[i], target)) return "attribute " + name + " is not one number";
    }
    if (!has_experts) return "attribute num_experts is missing; expected 1 to 16";
    if (!has_temperature) return "attribute temperature is missing; expected a finite number above 0";
    if (!(experts >= 1.0 && experts <= kMaxExperts) || experts != std::floor(experts)) {
        return "attribute num_experts is " + number_text(experts) + "; expected a whole number from 1 to 16";
    }
    const float as_float = static_cast<float>(temperature);
    if (!(as_float > 0.0f) || !std::isnormal(as_float)) {
        return "attribute temperature is " + number_text(temperature) + "; expected a finite number above 0";
    }
    if (with_weights != 0.0 && with_weights != 1.0) {
        return "attribute with_weights is " + number_text(with_weights) + "; expected 0 or 1";
    }
    *attributes = {static_cast<std::int32_t>(experts), as_float, static_cast<std::int32_t>(with_weights)};
    return {};
}

// Which plugins share timings on inputs of equal shapes and formats: the temperature changes no kernel.
inline std::string timing_id(const Attributes& attributes) {
    return "moe3d-ExpertMix-K" + std::to_string(attributes.num_experts) + "-weights" +
           std::to_string(attributes.with_weights) + "-revision" + std::to_string(kKernelRevision);
}

inline std::string describe(const Attributes& attributes) {
    return "num_experts=" + std::to_string(attributes.num_experts) +
           " temperature=" + std::to_string(attributes.temperature) +
           " with_weights=" + std::to_string(attributes.with_weights);
}

inline std::string check_counts(int input_count, int output_count, const Attributes& attributes) {
    if (input_count != kInputs) {
        return std::to_string(input_count) + " inputs; expected 5: hidden and the four operands";
    }
    if (output_count != outputs(attributes)) {
        return std::to_string(output_count) + " outputs; expected " + std::to_string(outputs(attributes)) +
               " with with_weights=" + std::to_string(attributes.with_weights);
    }
    return {};
}

// --- types and formats

// TensorRT's formats by how the channels of (N, C, H, W) lie. Formats of the fourth dimension from the end (kDHWC,
// kDHWC8) put N last in such a tensor, and vector-major ones (kCHW2 to kCHW32) are not channels last: neither is taken.
enum class Format { kLinear, kHwc, kHwc8, kHwc16, kOther };

constexpr int kOtherType = -1;  // of an element, beside enum moe3d_type

// Whether input or output number `position` (outputs follow the inputs) may come so. None depends on another.
constexpr bool supports(int position, int type, Format format, const Attributes& attributes) {
    if (position < 0 || position >= kInputs + outputs(attributes)) return false;
    if (position > 0) return type == MOE3D_FLOAT32 && format == Format::kLinear;
    switch (format) {
        case Format::kLinear: return type == MOE3D_FLOAT32 || type == MOE3D_FLOAT16 || type == MOE3D_BFLOAT16;
        case Format::kHwc: return type == MOE3D_FLOAT32;
        case Format::kHwc8: return type == MOE3D_FLOAT16 || type == MOE3D_BFLOAT16;
        case Format::kHwc16: return type == MOE3D_FLOAT16;
        default: return false;
    }
}

constexpr int layout_of(Format format) { return format == Format::kLinear ? MOE3D_NCHW : MOE3D_CHANNELS_LAST; }

// Elements from a pixel to the next: formats in vectors pad the channels. 0 for kLinear.
constexpr std::int64_t pixel_stride_of(Format format, std::int64_t channels) {
    const std::int64_t vector = format == Format::kHwc16 ? 16 : format == Format::kHwc8 ? 8 : 1;
    return format == Format::kLinear ? 0 : ceil_div(channels, vector) * vector;
}

// --- shapes

constexpr int kExpertsAxis = -1;                         // in the tables below: K
constexpr int kMapAxes[] = {0, 2, 3};                    // depth, confidence (N, H, W) from hidden's axes
constexpr int kWeightsAxes[] = {0, kExpertsAxis, 2, 3};  // weights (N, K, H, W)

constexpr std::int64_t kUnknown = -1;  // a size that is not fixed yet; only N, H and W of the hidden map may be that

struct Shape {
    int rank;
    std::int64_t size[8];
};

inline std::string shape_text(const Shape& shape) {
    std::string text = "(";
    for (int i = 0; i < shape.rank && i < 8; ++i) {
        text += (i ? ", " : "") + (shape.size[i] == kUnknown ? std::string("?") : std::to_string(shape.size[i]));
    }
    return text + ")";
}

// Fills the sizes that shapes give: views, height and width (0 where unknown), experts, expert_width, gate_width.
inline std::string read_shapes(const Shape (&inputs)[kInputs], const Attributes& attributes, Sizes* sizes) {
    const std::int64_t experts = attributes.num_experts;
    const auto wrong = [&](int input, const std::string& expected) {
        return std::string("input ") + kInputNames[input] + " is " + shape_text(inputs[input]) + "; expected " +
               expected;
    };
    const auto is = [](const Shape& shape, std::initializer_list<std::int64_t> expected) {
        if (shape.rank != static_cast<int>(expected.size())) return false;
        int axis = 0;
        for (const std::int64_t size : expected) {
            if (shape.size[axis++] != size) return false;
        }
        return true;
    };
    const std::string k = std::to_string(experts);
    const std::int64_t expert_width = inputs[1].rank == 3 ? inputs[1].size[2] : 0;
    const std::int64_t gate_width = inputs[3].rank == 2 ? inputs[3].size[1] : 0;
    if (!is(inputs[1], {experts, 2, expert_width}) || expert_width <= 0 || expert_width % kWidthStep) {
        return wrong(1, "(" + k + ", 2, Ce) with Ce a multiple of 8");
    }
    if (!is(inputs[2], {experts, 2})) return wrong(2, "(" + k + ", 2)");
    if (!is(inputs[3], {experts, gate_width}) || gate_width <= 0 || gate_width % kWidthStep) {
        return wrong(3, "(" + k + ", Cg) with Cg a multiple of 8");
    }
    if (!is(inputs[4], {experts})) return wrong(4, "(" + k + ")");

    const Shape& hidden = inputs[0];
    const std::int64_t needed = experts * expert_width + gate_width;
    if (hidden.rank != 4 || hidden.size[1] != needed || hidden.size[0] < kUnknown || hidden.size[2] < kUnknown ||
        hidden.size[3] < kUnknown) {
        return wrong(0, "(N, " + std::to_string(needed) + ", H, W), " + k + " experts of " +
                            std::to_string(expert_width) + " channels and a gate of " + std::to_string(gate_width));
    }
    const auto known = [](std::int64_t size) { return size == kUnknown ? 0 : size; };
    sizes->experts = experts;
    sizes->expert_width = expert_width;
    sizes->gate_width = gate_width;
    sizes->views = known(hidden.size[0]);
    sizes->height = known(hidden.size[2]);
    sizes->width = known(hidden.size[3]);
    sizes->temperature = attributes.temperature;
    return {};
}

// All of a launch's sizes, from the shapes, the type and the format of the hidden map.
inline std::string read_sizes(const Shape (&inputs)[kInputs], int type, Format format, const Attributes& attributes,
                              Sizes* sizes) {
    Sizes read{};
    if (std::string error = read_shapes(inputs, attributes, &read); !error.empty()) return error;
    if (!supports(0, type, format, attributes)) return "input hidden is in a type or format without a kernel";
    read.type = type;
    read.layout = layout_of(format);
    read.pixel_stride = pixel_stride_of(format, channels(read));
    if (const int status = check_sizes(read)) {
        return "input hidden is " + shape_text(inputs[0]) + ": " + status_text(status);
    }
    *sizes = read;
    return {};
}

}  // namespace moe3d
