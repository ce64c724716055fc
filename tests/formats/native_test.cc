#include "formats/native.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "base/error_info.h"
#include "tests/formats/format_test_util.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

ModelSpec Spec() {
  ModelSpec spec;
  spec.name = "tiny";
  spec.geometry.page_tokens = 4;
  LayerGroupSpec group;
  group.layers = {0, 2};
  group.kv_heads = 2;
  group.k_dim = group.v_dim = 4;
  spec.geometry.groups.push_back(group);
  group.layers = {1};
  group.v_dim = 0;
  spec.geometry.groups.push_back(group);
  return spec;
}
Model ModelOf(const ModelSpec& spec) {
  return Model::Create(spec).value();
}

// A byte of a row says where it belongs.
absl::Status Rows(uint32_t group, uint32_t layer, RowKind kind, uint64_t first, uint64_t count,
                  std::span<std::byte> out) {
  for (size_t i = 0; i < out.size(); ++i) {
    out[i] = static_cast<std::byte>(group * 101 + layer * 31 + (kind == RowKind::kV) * 7 +
                                    first * (out.size() / count) + i);
  }
  return absl::OkStatus();
}

std::string File(const Model& model, const TenantSalt& salt) {
  NativeHeader header = NativeHeaderOf(model);
  header.tokens = {5, 6, 7, 8, 9};
  header.canonical_length = 5;
  header.inputs = {{2, Sha256Of("image")}};
  std::string out;
  EXPECT_TRUE(WriteNative(header, salt, Rows, [&](absl::string_view part) {
                out.append(part.data(), part.size());
                return absl::OkStatus();
              }).ok());
  EXPECT_EQ(out.size(), NativeFileBytes(header));
  return out;
}

const TenantSalt kSalt = DeriveTenantSalt("secret", "tenant");

TEST(NativeTest, HeaderAndRowsComeBackAndAreProven) {
  const Model model = ModelOf(Spec());
  const std::string bytes = File(model, kSalt);
  const auto file = NativeFile::Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->header().tokens.size(), 5);
  EXPECT_EQ(file->header().inputs[0].position, 2);
  EXPECT_TRUE(file->CheckModel(model).ok());
  EXPECT_TRUE(file->IsProvenBy(kSalt));
  EXPECT_FALSE(file->IsProvenBy(DeriveTenantSalt("secret", "another tenant")));
  EXPECT_FALSE(file->IsProvenBy(DeriveTenantSalt("another secret", "tenant")));
  for (const auto& [group, layer, kind] :
       {std::tuple{0u, 0u, RowKind::kK}, {0u, 1u, RowKind::kV}, {1u, 0u, RowKind::kK}}) {
    const auto rows = file->Rows(group, layer, kind, 1, 3);
    ASSERT_TRUE(rows.ok()) << rows.status();
    std::string expected(3 * 16, '\0');
    ASSERT_TRUE(Rows(group, layer, kind, 1, 3,
                     {reinterpret_cast<std::byte*>(expected.data()), expected.size()})
                    .ok());
    EXPECT_EQ(*rows, expected);
  }
  EXPECT_FALSE(file->Rows(0, 2, RowKind::kK, 0, 1).ok());
  EXPECT_FALSE(file->Rows(0, 0, RowKind::kK, 5, 1).ok());
  EXPECT_FALSE(file->Rows(0, 0, RowKind::kK, ~uint64_t{0}, 2).ok());
}

TEST(NativeTest, AnyChangedByteIsFound) {
  const std::string bytes = File(ModelOf(Spec()), kSalt);
  for (size_t i = 0; i + 32 < bytes.size(); i += 3) {
    std::string changed = bytes;
    changed[i] = static_cast<char>(changed[i] ^ 4);
    EXPECT_FALSE(NativeFile::Parse(changed).ok()) << i;
  }
  // The proof itself: the rows are read, and are nobody's.
  std::string forged = bytes;
  forged.back() = static_cast<char>(forged.back() ^ 1);
  const auto file = NativeFile::Parse(forged);
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FALSE(file->IsProvenBy(kSalt));
}

TEST(NativeTest, HostileVariantsAreRefused) {
  CheckHostileVariants(File(ModelOf(Spec()), kSalt),
                       [](absl::string_view bytes) { return NativeFile::Parse(bytes).status(); });
}

TEST(NativeTest, AnotherModelIsNamed) {
  const std::string bytes = File(ModelOf(Spec()), kSalt);
  const auto file = NativeFile::Parse(bytes);
  ASSERT_TRUE(file.ok()) << file.status();
  ModelSpec pages = Spec(), rope = Spec(), weights = Spec(), groups = Spec();
  pages.geometry.page_tokens = 8;
  rope.geometry.groups[1].k_type = DataType::kBF16;
  weights.weights_digest = Sha256Of("other weights");
  groups.geometry.groups.pop_back();
  const std::pair<ModelSpec, const char*> cases[] = {
      {pages, "page_tokens 4 != 8"},
      {rope, "layer group 1 differs"},
      {weights, "weights, tokenizer or adapters differ"},
      {groups, "2 layer groups, the model has 1"},
  };
  for (const auto& [spec, text] : cases) {
    const absl::Status status = file->CheckModel(ModelOf(spec));
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(GetReason(status), "MODEL_MISMATCH");
    EXPECT_THAT(std::string(status.message()), HasSubstr(text));
  }
}

}  // namespace
}  // namespace pagetide
