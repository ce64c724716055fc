// The page record's format: golden bytes (docs/store_format.md), round trip, and every kind of
// damage.
#include "kvstore/page_record.h"

#include <gtest/gtest.h>

#include <random>

#include "absl/strings/escaping.h"
#include "kvstore/manifest_record.h"
#include "kvstore/retention.h"
#include "tests/contract/test_page.h"

namespace pagetide {
namespace {

PageRecordMeta GoldenMeta(const std::vector<std::byte>& body) {
  PageRecordMeta meta;
  meta.key = PageKey{Sha256Of("page")};
  meta.checksum = ChecksumOf(body);
  meta.body_bytes = body.size();
  meta.fingerprint = Sha256Of("fingerprint");
  meta.prefix = PrefixKey{Sha256Of("prefix")};
  meta.parent = PrefixKey{Sha256Of("parent")};
  meta.numerics_id = "cpu/1";
  meta.group = 2;
  meta.depth = 3;
  return meta;
}

std::vector<std::byte> GoldenBody() {
  std::vector<std::byte> body(16);
  for (size_t i = 0; i < body.size(); ++i) body[i] = static_cast<std::byte>(i);
  return body;
}

// Also printed, field by field, in docs/store_format.md. These bytes are on disks: they never
// change.
constexpr char kGoldenHex[] =
    "505450470100c5001000000000000000e2ca0d87cc122884e207768231069572"
    "3660315a9af3df255d8f19ab077e4797822b41488a0e2a04bc6af71213c23274"
    "44863b03e9909b7100e05b02526909a346fd7455183f6619e0fe6198c89981e0"
    "e7a2e8b216e5aec3facf743962d3997f2e7d70088ef257de472d6a258049832e"
    "e47125968b3b71049fbc4802d1e40a71ea1359decfabacf70b34588037d4ff0c"
    "020000000300000000000300050000001000000000000000374183186606d36f"
    "6370752f31";

TEST(PageRecordTest, GoldenBytes) {
  EXPECT_EQ(absl::BytesToHexString(EncodePageRecordHeader(GoldenMeta(GoldenBody()))), kGoldenHex);
}

// The record of a compressed body: codec 1, and the bytes that are stored.
TEST(PageRecordTest, GoldenBytesOfACompressedRecord) {
  std::vector<std::byte> body(64, std::byte{7});
  PageBodyEncoder encoder(PageCompression::kZstd);
  const std::span<const std::byte> stored = encoder.Encode(body);
  ASSERT_FALSE(stored.empty());
  const PageRecordMeta meta = GoldenMeta(body);
  const std::string header = EncodeCompressedRecordHeader(meta, stored.size());
  EXPECT_EQ(header.size(), PageRecordHeaderBytes(meta));
  EXPECT_EQ(absl::BytesToHexString(header.substr(168, 16)),
            "0100030005000000" +
                absl::BytesToHexString(std::string(1, static_cast<char>(stored.size()))) +
                "00000000000000");
  EXPECT_EQ(ParsePageRecordHeader(header)->codec, PageCodec::kPlanes);
  EXPECT_TRUE(VerifyPageRecord(header, stored, meta.key, meta.checksum).ok());
  std::vector<std::byte> out(body.size());
  EXPECT_TRUE(UnpackPageRecord(header, stored, meta.key, meta.checksum, out).ok());
  EXPECT_EQ(out, body);
  // The wrong key, the wrong checksum, another size, and a raw record where a packed one is meant.
  EXPECT_TRUE(absl::IsDataLoss(
      UnpackPageRecord(header, stored, PageKey{Sha256Of("x")}, meta.checksum, out)));
  EXPECT_TRUE(absl::IsDataLoss(UnpackPageRecord(header, stored, meta.key, {1, 2}, out)));
  EXPECT_TRUE(absl::IsDataLoss(
      UnpackPageRecord(header, stored, meta.key, meta.checksum, std::span(out).first(63))));
  EXPECT_TRUE(absl::IsDataLoss(
      UnpackPageRecord(EncodePageRecordHeader(meta), body, meta.key, meta.checksum, out)));
}

// A header that is intact and lies about its body: nothing of the declared size is allocated, since
// nothing is read.
TEST(PageRecordTest, DeclaredSizesMustBePossible) {
  PageRecordMeta meta = GoldenMeta(GoldenBody());
  meta.body_bytes = kMaxPageBodyBytes;
  for (uint64_t stored : {uint64_t{0}, uint64_t{1}, MinCompressedBytes(kMaxPageBodyBytes) - 1,
                          kMaxPageBodyBytes, uint64_t{1} << 60}) {
    const auto parsed = ParsePageRecordHeader(EncodeCompressedRecordHeader(meta, stored));
    EXPECT_TRUE(absl::IsDataLoss(parsed.status())) << stored << ": " << parsed.status();
  }
  EXPECT_TRUE(ParsePageRecordHeader(
                  EncodeCompressedRecordHeader(meta, MinCompressedBytes(kMaxPageBodyBytes)))
                  .ok());
}

TEST(PageRecordTest, RoundTrip) {
  const std::vector<std::byte> body = GoldenBody();
  const PageRecordMeta meta = GoldenMeta(body);
  const std::string bytes = EncodePageRecordHeader(meta);
  EXPECT_EQ(bytes.size(), PageRecordHeaderBytes(meta));
  const auto parsed = ParsePageRecordHeader(bytes + "what follows is not the header's");
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->meta.key, meta.key);
  EXPECT_EQ(parsed->meta.checksum, meta.checksum);
  EXPECT_EQ(parsed->meta.body_bytes, 16u);
  EXPECT_EQ(parsed->stored_bytes, 16u);
  EXPECT_EQ(parsed->meta.fingerprint, meta.fingerprint);
  EXPECT_EQ(parsed->meta.prefix, meta.prefix);
  EXPECT_EQ(parsed->meta.parent, meta.parent);
  EXPECT_EQ(parsed->meta.numerics_id, "cpu/1");
  EXPECT_EQ(parsed->meta.group, 2u);
  EXPECT_EQ(parsed->meta.depth, 3u);
  EXPECT_TRUE(VerifyPageRecord(bytes, body, meta.key, meta.checksum).ok());

  PageRecordMeta lone = meta;
  lone.prefix.reset();
  lone.parent.reset();
  lone.numerics_id.clear();
  const auto parsed_lone = ParsePageRecordHeader(EncodePageRecordHeader(lone));
  ASSERT_TRUE(parsed_lone.ok()) << parsed_lone.status();
  EXPECT_FALSE(parsed_lone->meta.prefix.has_value());
  EXPECT_FALSE(parsed_lone->meta.parent.has_value());
}

TEST(PageRecordTest, OneFlippedBitAnywhereIsFound) {
  const std::vector<std::byte> body = GoldenBody();
  const PageRecordMeta meta = GoldenMeta(body);
  const std::string header = EncodePageRecordHeader(meta);
  for (size_t bit = 0; bit < header.size() * 8; ++bit) {
    std::string damaged = header;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(VerifyPageRecord(damaged, body, meta.key, meta.checksum).ok()) << "bit " << bit;
  }
  for (size_t bit = 0; bit < body.size() * 8; ++bit) {
    std::vector<std::byte> damaged = body;
    damaged[bit / 8] ^= std::byte{1} << (bit % 8);
    EXPECT_TRUE(absl::IsDataLoss(VerifyPageRecord(header, damaged, meta.key, meta.checksum)))
        << "body bit " << bit;
  }
}

TEST(PageRecordTest, ASwappedValidRecordIsFound) {
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2);
  const std::string header_b = EncodePageRecordHeader(b.meta);
  ASSERT_TRUE(VerifyPageRecord(header_b, b.body, b.meta.key, b.meta.checksum).ok());
  EXPECT_TRUE(absl::IsDataLoss(VerifyPageRecord(header_b, b.body, a.meta.key, a.meta.checksum)));
}

TEST(PageRecordTest, ATruncatedHeaderIsFound) {
  const std::string header = EncodePageRecordHeader(GoldenMeta(GoldenBody()));
  for (size_t n = 0; n < header.size(); ++n) {
    EXPECT_TRUE(absl::IsDataLoss(ParsePageRecordHeader(header.substr(0, n)).status())) << n;
  }
}

TEST(PageRecordTest, AnUnknownVersionIsSaidSo) {
  std::string header = EncodePageRecordHeader(GoldenMeta(GoldenBody()));
  header[4] = 2;
  EXPECT_TRUE(absl::IsUnimplemented(ParsePageRecordHeader(header).status()));
}

TEST(PageRecordTest, RandomBytesNeverParse) {
  std::mt19937_64 rng(7);
  for (int i = 0; i < 20000; ++i) {
    std::string bytes(rng() % 300, '\0');
    for (char& c : bytes) c = static_cast<char>(rng());
    // Half of them get past the magic and the version.
    if (i % 2 == 0 && bytes.size() > 8) bytes.replace(0, 6, std::string("PTPG\1\0", 6));
    EXPECT_FALSE(ParsePageRecordHeader(bytes).ok());
  }
}

TEST(PageRecordTest, ValidatesWhatItWillStore) {
  PageRecordMeta meta = GoldenMeta(GoldenBody());
  EXPECT_TRUE(ValidatePageMeta(meta).ok());
  meta.body_bytes = 0;
  EXPECT_TRUE(absl::IsInvalidArgument(ValidatePageMeta(meta)));
  meta.body_bytes = kMaxPageBodyBytes + 1;
  EXPECT_TRUE(absl::IsInvalidArgument(ValidatePageMeta(meta)));
  meta = GoldenMeta(GoldenBody());
  meta.parent = meta.prefix;
  EXPECT_TRUE(absl::IsInvalidArgument(ValidatePageMeta(meta)));
  meta.prefix.reset();  // a private page after a keyed one
  EXPECT_TRUE(ValidatePageMeta(meta).ok());
}

TEST(PageRecordTest, AStoredPageThatIsItsOwnParentIsDamage) {
  PageRecordMeta meta = GoldenMeta(GoldenBody());
  meta.parent = meta.prefix;
  EXPECT_TRUE(absl::IsDataLoss(ParsePageRecordHeader(EncodePageRecordHeader(meta)).status()));
}

ManifestRecord GoldenManifest() {
  ManifestRecord manifest;
  manifest.name = "s";
  manifest.version = 7;
  manifest.request_id = "r";
  manifest.payload = std::string("p\0q", 3);
  manifest.saved_at = absl::FromUnixNanos(1234567890);
  manifest.summary = "u";
  manifest.expires_at = absl::FromUnixNanos(2000000000);
  manifest.priority = 60;
  manifest.pages.push_back({PageKey{Sha256Of("page")}, {1, 2}});
  return manifest;
}

// What programs of format version 1 wrote: without summary, end and priority.
constexpr char kGoldenManifestV1Hex[] =
    "50544d4601000700000000000000d20296490000000001000000000000007301"
    "0000000000000072030000000000000070007101000000000000003660315a9a"
    "f3df255d8f19ab077e4797822b41488a0e2a04bc6af71213c232740100000000"
    "000000020000000000000054d05d36ff2a3a820d000ecca6576e2a";

constexpr char kGoldenManifestHex[] =
    "50544d4602000700000000000000d2029649000000000100943577000000003c0000000100000000"
    "00000073010000000000000072010000000000000075030000000000000070007101000000000000"
    "003660315a9af3df255d8f19ab077e4797822b41488a0e2a04bc6af71213c2327401000000000000"
    "0002000000000000005ff84f12b107de06d9b7cc62be5d360c";

TEST(ManifestRecordTest, ReadsVersionOne) {
  const auto parsed = ParseManifest(absl::HexStringToBytes(kGoldenManifestV1Hex));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->name, "s");
  EXPECT_EQ(parsed->payload, std::string("p\0q", 3));
  EXPECT_EQ(parsed->summary, "");
  EXPECT_EQ(parsed->expires_at, std::nullopt);
  EXPECT_EQ(parsed->priority, kDefaultPriority);
  ASSERT_EQ(parsed->pages.size(), 1u);
}

TEST(ManifestRecordTest, AnUnknownVersionIsSaidSo) {
  std::string bytes = EncodeManifest(GoldenManifest());
  bytes[4] = 9;
  EXPECT_TRUE(absl::IsUnimplemented(ParseManifest(bytes).status()));
  bytes = EncodeManifestEntry(EntryOf(GoldenManifest()));
  bytes[4] = 9;
  EXPECT_TRUE(absl::IsUnimplemented(ParseManifestEntry(bytes).status()));
}

TEST(ManifestRecordTest, EntryRoundTripAndDamage) {
  const std::string bytes = EncodeManifestEntry(EntryOf(GoldenManifest()));
  const auto parsed = ParseManifestEntry(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(EncodeManifestEntry(*parsed), bytes);
  EXPECT_EQ(parsed->num_pages, 1u);
  EXPECT_EQ(parsed->payload_bytes, 3u);
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(ParseManifestEntry(damaged).ok()) << "bit " << bit;
  }
  for (size_t n = 0; n < bytes.size(); ++n) {
    EXPECT_FALSE(ParseManifestEntry(bytes.substr(0, n)).ok());
  }
}

TEST(RetentionTest, RoundTripAndBadBytes) {
  Retention retention;
  retention.priority = 77;
  retention.expires_at = absl::FromUnixNanos(-5);
  const std::string bytes = EncodeRetention(retention);
  const auto parsed = ParseRetention(bytes);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->priority, 77u);
  EXPECT_EQ(parsed->expires_at, retention.expires_at);
  EXPECT_EQ(parsed->pinned_until, std::nullopt);
  for (size_t n = 0; n < bytes.size(); ++n) EXPECT_FALSE(ParseRetention(bytes.substr(0, n)).ok());
  EXPECT_FALSE(ParseRetention(bytes + "x").ok());
  std::string newer = bytes;
  newer[0] = 2;
  EXPECT_TRUE(absl::IsUnimplemented(ParseRetention(newer).status()));
}

TEST(ManifestRecordTest, GoldenBytes) {
  EXPECT_EQ(absl::BytesToHexString(EncodeManifest(GoldenManifest())), kGoldenManifestHex);
}

TEST(ManifestRecordTest, RoundTrip) {
  const ManifestRecord manifest = GoldenManifest();
  const auto parsed = ParseManifest(EncodeManifest(manifest));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  EXPECT_EQ(parsed->name, manifest.name);
  EXPECT_EQ(parsed->version, 7u);
  EXPECT_EQ(parsed->request_id, "r");
  EXPECT_EQ(parsed->payload, manifest.payload);
  EXPECT_EQ(parsed->saved_at, manifest.saved_at);
  ASSERT_EQ(parsed->pages.size(), 1u);
  EXPECT_EQ(parsed->pages[0].checksum, (Checksum128{1, 2}));
}

TEST(ManifestRecordTest, OneFlippedBitOrMissingByteIsFound) {
  const std::string bytes = EncodeManifest(GoldenManifest());
  for (size_t bit = 0; bit < bytes.size() * 8; ++bit) {
    std::string damaged = bytes;
    damaged[bit / 8] = static_cast<char>(damaged[bit / 8] ^ (1 << (bit % 8)));
    EXPECT_FALSE(ParseManifest(damaged).ok()) << "bit " << bit;
  }
  for (size_t n = 0; n < bytes.size(); ++n) EXPECT_FALSE(ParseManifest(bytes.substr(0, n)).ok());
}

}  // namespace
}  // namespace pagetide
