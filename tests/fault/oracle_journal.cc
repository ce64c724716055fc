#include "tests/fault/oracle_journal.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace pagetide {

OracleJournal::OracleJournal(const std::string& path)
    : path_(path), fd_(::open(path.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600)) {}
OracleJournal::~OracleJournal() {
  ::close(fd_);
}

void OracleJournal::AppendSynced(const std::string& lines) {
  MutexLock lock(&mu_);
  const bool ok = ::write(fd_, lines.data(), lines.size()) == static_cast<ssize_t>(lines.size()) &&
                  ::fdatasync(fd_) == 0;
  if (!ok) ADD_FAILURE() << "the oracle's journal cannot be written";
}

void OracleJournal::Intend(std::span<const TestPage> pages, std::span<const uint64_t> seeds) {
  std::string lines;
  for (size_t i = 0; i < pages.size(); ++i) {
    absl::StrAppend(&lines, "I ", seeds[i], " ", pages[i].meta.body_bytes, " ",
                    pages[i].meta.checksum.low, " ", pages[i].meta.checksum.high, "\n");
  }
  AppendSynced(lines);
}

void OracleJournal::Acknowledge(std::span<const uint64_t> seeds) {
  std::string lines;
  for (const uint64_t seed : seeds) absl::StrAppend(&lines, "A ", seed, "\n");
  AppendSynced(lines);
}

void OracleJournal::AcknowledgeManifest(const std::string& name, std::span<const uint64_t> seeds) {
  std::string line = absl::StrCat("M ", name);
  for (const uint64_t seed : seeds) absl::StrAppend(&line, " ", seed);
  AppendSynced(line + "\n");
}

OracleJournal::Verdict OracleJournal::Read() const {
  Verdict verdict;
  std::ifstream in(path_);
  for (std::string line; std::getline(in, line);) {
    std::istringstream fields(line);
    std::string kind;
    fields >> kind;
    if (kind == "M") {
      std::string name;
      fields >> name;
      std::vector<uint64_t>& seeds = verdict.manifests[name];
      for (uint64_t seed; fields >> seed;) seeds.push_back(seed);
      continue;
    }
    uint64_t seed = 0;
    fields >> seed;
    Entry& entry = verdict.pages[seed];
    if (kind == "A") {
      entry.acked = true;
    } else {
      fields >> entry.bytes >> entry.checksum.low >> entry.checksum.high;
    }
  }
  return verdict;
}

std::string CampaignResult::ToJson(const std::string& campaign) const {
  std::vector<double> sorted = recovery_seconds;
  std::sort(sorted.begin(), sorted.end());
  const auto at = [&](double q) {
    return sorted.empty()
               ? 0.0
               : sorted[std::min(sorted.size() - 1,
                                 static_cast<size_t>(q * static_cast<double>(sorted.size())))];
  };
  return absl::StrFormat(
      "{\"campaign\":\"%s\",\"kills\":%d,\"kills_in_flight\":%d,\"acked\":%d,\"lost\":%d,"
      "\"bytes_verified\":%d,\"wrong\":%d,\"manifests_acked\":%d,\"manifests_lost\":%d,"
      "\"unacked_found\":%d,\"recovery_p50\":%.3f,\"recovery_p99\":%.3f,\"recovery_max\":%.3f,"
      "\"seed\":%d}",
      campaign, kills, kills_in_flight, acked, lost, bytes_verified, wrong, manifests_acked,
      manifests_lost, unacked_found, at(0.5), at(0.99), sorted.empty() ? 0.0 : sorted.back(), seed);
}

void VerifyAgainstJournal(const OracleJournal::Verdict& verdict, PageStore* store,
                          CampaignResult* result) {
  const MonotonicTime deadline = Clock::Real()->MonotonicNow() + absl::Seconds(120);
  for (const auto& [seed, entry] : verdict.pages) {
    const TestPage page = MakeTestPage(seed, entry.bytes);
    std::vector<std::byte> body(entry.bytes);
    const GetPage get{page.meta.key, body, {}};
    const GetPageResult got = store->GetPages({&get, 1}, deadline)[0];
    EXPECT_TRUE(got.status.ok()) << got.status;
    if (entry.acked) ++result->acked;
    if (got.outcome != GetOutcome::kHit) {
      if (entry.acked) ++result->lost;
      continue;
    }
    if (!entry.acked) ++result->unacked_found;
    result->bytes_verified += body.size();
    if (body != page.body || ChecksumOf(body) != entry.checksum) ++result->wrong;
  }
  for (const auto& [name, seeds] : verdict.manifests) {
    ++result->manifests_acked;
    const auto manifest = store->GetManifest(name, deadline);
    bool whole = manifest.ok() && manifest->pages.size() == seeds.size();
    for (size_t i = 0; whole && i < seeds.size(); ++i) {
      const auto page = verdict.pages.find(seeds[i]);
      whole = page != verdict.pages.end() && manifest->pages[i].checksum == page->second.checksum;
      const auto found = store->LookupPages({&manifest->pages[i].key, 1}, deadline);
      whole = whole && found.ok() && (*found)[0].present;
    }
    if (!whole) ++result->manifests_lost;
  }
}

}  // namespace pagetide
