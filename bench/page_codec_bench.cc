// What compression of page bodies gains and costs, against memcpy in the same run: rows of the
// reference decoder in several types, normal numbers, and raw bytes of files.
//
//   page_codec_bench [--tokens 2048] [--repeats 5] [NAME=FILE …]
//
// Files are cut into pages of 1 MiB; bench/dump_kv_rows.py makes one of a real model. Bytes per
// second are raw bytes of pages that are in memory, one thread, best of the repeats; "decode" is of
// the pages that were compressed, checksum not included. Prints a Markdown table.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "bench/seconds_now.h"
#include "decoder/decoder.h"
#include "decoder/local_kv_backend.h"
#include "kernels/convert.h"
#include "kvstore/page_body_codec.h"

namespace pagetide {
namespace {

using Pages = std::vector<std::vector<std::byte>>;
constexpr size_t kPageTokens = 256;
constexpr size_t kFilePageBytes = size_t{1} << 20;

// Pages as a worker would store them: [layer][K rows][V rows].
Pages DecoderPages(kernels::KvType type, size_t num_tokens) {
  DecoderConfig config;
  config.kv_type = type;
  const auto decoder = Decoder::Create(config).value();
  LocalKvBackend kv(config);
  std::string text;
  for (size_t i = 0; text.size() < num_tokens; ++i) {
    text += "Paragraph " + std::to_string(i * 7919 % 1000) +
            ": the quick brown fox jumps over the lazy dog, and every good boy does fine. ";
  }
  std::vector<uint32_t> tokens = TokensOf(text);
  tokens.resize(num_tokens / kPageTokens * kPageTokens);
  if (!decoder->Prefill(tokens, kv).ok()) std::exit(1);
  const size_t run = kPageTokens * static_cast<size_t>(config.row_bytes());
  Pages pages(tokens.size() / kPageTokens);
  for (size_t p = 0; p < pages.size(); ++p) {
    for (int layer = 0; layer < config.num_layers; ++layer) {
      for (const auto rows : {kv.k_rows(layer), kv.v_rows(layer)}) {
        const auto part = rows.subspan(p * run, run);
        pages[p].insert(pages[p].end(), part.begin(), part.end());
      }
    }
  }
  return pages;
}

Pages NormalPages(kernels::KvType type) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const size_t count = kFilePageBytes / static_cast<size_t>(kernels::GroupBytes(type)) *
                       static_cast<size_t>(kernels::GroupElements(type));
  Pages pages(4);
  for (auto& page : pages) {
    std::vector<float> x(count);
    for (float& v : x) v = normal(random);
    page.resize(static_cast<size_t>(kernels::EncodedBytes(type, static_cast<int64_t>(count))));
    kernels::NarrowFromF32(type, x.data(), static_cast<int64_t>(count), page.data());
  }
  return pages;
}

Pages FilePages(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  const std::string bytes((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
  Pages pages;
  for (size_t at = 0; at + kFilePageBytes <= bytes.size(); at += kFilePageBytes) {
    const auto* first = reinterpret_cast<const std::byte*>(bytes.data() + at);
    pages.emplace_back(first, first + kFilePageBytes);
  }
  if (pages.empty()) {
    std::fprintf(stderr, "page_codec_bench: %s has %zu bytes, a page has %zu\n", path.c_str(),
                 bytes.size(), kFilePageBytes);
    std::exit(1);
  }
  return pages;
}

double Best(int repeats, const std::function<void()>& run) {
  double best = 1e9;
  for (int i = 0; i < repeats; ++i) {
    const double start = SecondsNow();
    run();
    best = std::min(best, SecondsNow() - start);
  }
  return best;
}

void Measure(const std::string& name, const Pages& pages, int repeats) {
  size_t raw_bytes = 0;
  size_t largest = 0;
  for (const auto& page : pages) {
    raw_bytes += page.size();
    largest = std::max(largest, page.size());
  }
  std::vector<std::byte> out(largest);
  const double gb = static_cast<double>(raw_bytes) / 1e9;
  const double memcpy_seconds = Best(repeats, [&] {
    for (const auto& page : pages) std::memcpy(out.data(), page.data(), page.size());
  });
  for (const auto& [label, compression] :
       {std::pair("lz4", PageCompression::kLz4), std::pair("zstd", PageCompression::kZstd)}) {
    PageBodyEncoder encoder(compression);
    Pages stored(pages.size());
    StoreCodecBytes tally;
    size_t stored_bytes = 0;
    size_t packed_raw_bytes = 0;
    for (size_t i = 0; i < pages.size(); ++i) {
      const auto body = encoder.Encode(pages[i]);
      stored[i].assign(body.begin(), body.end());
      stored_bytes += body.empty() ? pages[i].size() : body.size();
      if (body.empty()) continue;
      packed_raw_bytes += pages[i].size();
      tally.lz4.in += encoder.tally().lz4.in;
      tally.zstd.in += encoder.tally().zstd.in;
    }
    const double encode = Best(repeats, [&] {
      for (const auto& page : pages) encoder.Encode(page);
    });
    PageBodyDecoder decoder;
    const double decode = Best(repeats, [&] {
      for (size_t i = 0; i < pages.size(); ++i) {
        if (stored[i].empty()) continue;
        const std::span<std::byte> raw(out.data(), pages[i].size());
        if (!decoder.Decode(stored[i], raw).ok() ||
            !std::equal(raw.begin(), raw.end(), pages[i].begin())) {
          std::fprintf(stderr, "page_codec_bench: %s does not come back\n", name.c_str());
          std::exit(1);
        }
      }
    });
    // The comparison above is part of the loop: it reads both once, as a memcpy does.
    std::printf(
        "| %s | %s | %.1f | %.3f | %.0f%% | %.0f%% | %.2f | %s | %.1f |\n", name.c_str(), label,
        static_cast<double>(raw_bytes) / 1e6,
        static_cast<double>(raw_bytes) / static_cast<double>(stored_bytes),
        100.0 * static_cast<double>(tally.zstd.in) / static_cast<double>(raw_bytes),
        100.0 * static_cast<double>(tally.lz4.in) / static_cast<double>(raw_bytes), gb / encode,
        packed_raw_bytes == 0 ? "raw"
                              : std::to_string(static_cast<double>(packed_raw_bytes) / 1e9 / decode)
                                    .substr(0, 4)
                                    .c_str(),
        gb / memcpy_seconds);
    std::fflush(stdout);
  }
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  using namespace pagetide;
  CLI::App app{"Ratio and speed of page compression"};
  size_t tokens = 2048;
  int repeats = 5;
  std::vector<std::string> files;
  app.add_option("--tokens", tokens, "Tokens that the reference decoder is run over")
      ->capture_default_str();
  app.add_option("--repeats", repeats, "Repeats; the best counts")->capture_default_str();
  app.add_option("files", files, "NAME=FILE of raw rows");
  CLI11_PARSE(app, argc, argv);
  std::printf(
      "| rows | compression | MB | ratio | by zstd | by lz4 | encode GB/s | decode GB/s | memcpy "
      "GB/s |\n|---|---|---:|---:|---:|---:|---:|---:|---:|\n");
  for (const kernels::KvType type :
       {kernels::KvType::kF32, kernels::KvType::kF16, kernels::KvType::kBF16,
        kernels::KvType::kQ8_0, kernels::KvType::kQ4_0}) {
    Measure(std::string("decoder, ") + KvTypeName(type), DecoderPages(type, tokens), repeats);
  }
  for (const kernels::KvType type :
       {kernels::KvType::kF16, kernels::KvType::kBF16, kernels::KvType::kQ8_0}) {
    Measure(std::string("normal numbers, ") + KvTypeName(type), NormalPages(type), repeats);
  }
  for (const std::string& file : files) {
    const size_t equals = file.find('=');
    if (equals == std::string::npos) {
      std::fprintf(stderr, "page_codec_bench: %s is not NAME=FILE\n", file.c_str());
      return 2;
    }
    Measure(file.substr(0, equals), FilePages(file.substr(equals + 1)), repeats);
  }
  return 0;
}
