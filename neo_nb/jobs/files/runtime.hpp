// Runs the model beside this file with ONNX Runtime: C++17, onnxruntime_cxx_api.h, nothing else.
//
//   neo::Detector detect("model.onnx");
//   for (const neo::Box& box : detect({pixels, height, width}))   // RGB, row after row, 3 bytes per pixel
//       std::printf("%s %.3f\n", neo::class_names[box.class_id], box.confidence);
//
// Boxes alone: masks and keypoints are the model's fourth output, which runtime.py reads and this header does not.
//
// c++ -std=c++17 -I ONNXRUNTIME/include main.cpp -L ONNXRUNTIME/lib -lonnxruntime
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace neo {

// Of this model, as in metadata.json
constexpr int64_t batch = $batch;  // Images of one call; 0: any number
constexpr int content_height = $content_height, content_width = $content_width;  // Images are brought to this
constexpr int frame_height = $frame_height, frame_width = $frame_width;  // The same, padded
constexpr bool letterbox = $letterbox;  // Proportions are kept
constexpr float default_threshold = ${threshold}f;
constexpr int num_classes = $num_classes;
constexpr const char* class_names[] = {$class_names};

struct Image {
    const uint8_t* rgb;
    int height, width;
};

struct Box {
    int class_id;
    float confidence, x1, y1, x2, y2;  // Pixels of the image
};

namespace detail {

struct Tap {  // What a pixel of the scaled image takes from a line of the other one
    int first;
    std::vector<float> weights;
};

// One side of a scaling, as OpenCV's INTER_AREA (both sides shrink), INTER_LINEAR, and INTER_AREA where a side grows
inline std::vector<Tap> taps(int from, int to, bool area, bool shrinks) {
    const double scale = static_cast<double>(from) / to;
    std::vector<Tap> found(to);
    for (int i = 0; i < to; ++i) {
        if (area && shrinks) {
            const double low = i * scale, high = std::min((i + 1) * scale, static_cast<double>(from));
            found[i].first = static_cast<int>(low);
            for (int k = found[i].first; k < high - 1e-9 && k < from; ++k)
                found[i].weights.push_back(
                    static_cast<float>((std::min<double>(k + 1, high) - std::max<double>(k, low)) / (high - low)));
            continue;
        }
        double place = (i + 0.5) * scale - 0.5;
        int first = static_cast<int>(std::floor(place));
        double share = place - first;
        if (area) {
            first = static_cast<int>(std::floor(i * scale));
            share = (i + 1) - (first + 1) / scale;
            share = share <= 0 ? 0 : share - std::floor(share);
        }
        if (first < 0) first = 0, share = 0;
        if (first >= from - 1) first = from - 1, share = 0;
        found[i] = {first, {static_cast<float>(1 - share)}};
        if (share > 0) found[i].weights.push_back(static_cast<float>(share));
    }
    return found;
}

// An image into the upper left corner of a frame (3, frame_height, frame_width); its scaled size
inline std::pair<int64_t, int64_t> place(const Image& image, uint8_t* frame) {
    int height = content_height, width = content_width;
    if (letterbox) {
        const double scale = std::min(static_cast<double>(height) / image.height, static_cast<double>(width) / image.width);
        height = std::min(height, std::max(1, static_cast<int>(std::nearbyint(image.height * scale))));
        width = std::min(width, std::max(1, static_cast<int>(std::nearbyint(image.width * scale))));
    }
    const bool area = 2 * height < image.height || 2 * width < image.width;
    const bool shrinks = height <= image.height && width <= image.width;
    const auto rows = taps(image.height, height, area, shrinks), columns = taps(image.width, width, area, shrinks);
    std::vector<float> lines(static_cast<size_t>(image.height) * width * 3);
    for (int y = 0; y < image.height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c) {
                const uint8_t* from = image.rgb + (static_cast<size_t>(y) * image.width + columns[x].first) * 3 + c;
                float sum = 0;
                for (const float weight : columns[x].weights) sum += weight * *from, from += 3;
                lines[(static_cast<size_t>(y) * width + x) * 3 + c] = sum;
            }
    for (int y = 0; y < height; ++y)
        for (int x = 0; x < width; ++x)
            for (int c = 0; c < 3; ++c) {
                const float* from = lines.data() + (static_cast<size_t>(rows[y].first) * width + x) * 3 + c;
                float sum = 0;
                for (const float weight : rows[y].weights) sum += weight * *from, from += static_cast<size_t>(width) * 3;
                const float rounded = std::nearbyint(sum);
                frame[(static_cast<size_t>(c) * frame_height + y) * frame_width + x] =
                    static_cast<uint8_t>(std::min(255.0f, std::max(0.0f, rounded)));
            }
    return {height, width};
}

}  // namespace detail

class Detector {
  public:
    explicit Detector(const std::basic_string<ORTCHAR_T>& model, const Ort::SessionOptions& options = Ort::SessionOptions{})
        : session_(env_, model.c_str(), options) {}

    // Boxes of an image
    std::vector<Box> operator()(const Image& image, float threshold = default_threshold) {
        return many({image}, threshold).front();
    }

    // Boxes of each of any number of images; a model of a fixed batch gets its last one filled up
    std::vector<std::vector<Box>> many(const std::vector<Image>& images, float threshold = default_threshold) {
        std::vector<std::vector<Box>> found;
        const size_t step = batch ? batch : 8;
        for (size_t start = 0; start < images.size(); start += step)
            run(images, start, std::min(step, images.size() - start), threshold, found);
        return found;
    }

  private:
    void run(const std::vector<Image>& images, size_t start, size_t count, float threshold,
             std::vector<std::vector<Box>>& found) {
        const size_t whole = batch ? batch : count, area = static_cast<size_t>(3) * frame_height * frame_width;
        std::vector<uint8_t> frames(whole * area, 0);
        std::vector<int64_t> sizes(2 * whole), originals(2 * whole);
        for (size_t i = 0; i < whole; ++i) {
            const Image& image = images[start + (i < count ? i : 0)];
            if (!image.rgb || image.height < 1 || image.width < 1) throw std::invalid_argument("an image without pixels");
            std::tie(sizes[2 * i], sizes[2 * i + 1]) = detail::place(image, frames.data() + i * area);
            originals[2 * i] = image.height, originals[2 * i + 1] = image.width;
        }
        const int64_t shape[] = {static_cast<int64_t>(whole), 3, frame_height, frame_width};
        const int64_t pairs[] = {static_cast<int64_t>(whole), 2};
        const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
        std::vector<Ort::Value> given;
        given.push_back(Ort::Value::CreateTensor<uint8_t>(memory, frames.data(), frames.size(), shape, 4));
        given.push_back(Ort::Value::CreateTensor<int64_t>(memory, sizes.data(), sizes.size(), pairs, 2));
        given.push_back(Ort::Value::CreateTensor<int64_t>(memory, originals.data(), originals.size(), pairs, 2));
        const char* inputs[] = {"images", "sizes", "original_sizes"};
        const char* outputs[] = {"boxes", "scores", "labels"};
        const auto told = session_.Run(Ort::RunOptions{nullptr}, inputs, given.data(), 3, outputs, 3);
        const int64_t each = told[1].GetTensorTypeAndShapeInfo().GetShape().back();
        const float *boxes = told[0].GetTensorData<float>(), *scores = told[1].GetTensorData<float>();
        const int64_t* labels = told[2].GetTensorData<int64_t>();
        for (size_t i = 0; i < count; ++i) {
            found.emplace_back();
            for (int64_t k = i * each; k < static_cast<int64_t>(i + 1) * each; ++k)
                if (scores[k] >= threshold && labels[k] >= 0)
                    found.back().push_back({static_cast<int>(labels[k]), scores[k], boxes[4 * k], boxes[4 * k + 1],
                                            boxes[4 * k + 2], boxes[4 * k + 3]});
        }
    }

    Ort::Env env_{ORT_LOGGING_LEVEL_WARNING, "neo"};
    Ort::Session session_{nullptr};
};

}  // namespace neo
