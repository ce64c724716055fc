#include "base/digest.h"

#include <string>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

// FIPS 180-4 examples.
TEST(DigestTest, Sha256Vectors) {
  EXPECT_EQ(Sha256Of("").ToHex(),
            "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Sha256Of("abc").ToHex(),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

// RFC 4231, test case 2.
TEST(DigestTest, HmacVector) {
  EXPECT_EQ(HmacSha256("Jefe", "what do ya want for nothing?").ToHex(),
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
}

TEST(DigestTest, IntegersAreLittleEndianAndFieldsCarryTheirLength) {
  EXPECT_EQ(Sha256().AppendU32(0x01020304).Finish(), Sha256Of("\x04\x03\x02\x01"));
  EXPECT_EQ(Sha256().AppendU64(0x0102030405060708).Finish(),
            Sha256Of("\x08\x07\x06\x05\x04\x03\x02\x01"));
  EXPECT_EQ(Sha256().AppendField("ab").Finish(), Sha256Of(std::string("\x02\0\0\0\0\0\0\0ab", 10)));
  EXPECT_NE(Sha256().AppendField("ab").AppendField("c").Finish(),
            Sha256().AppendField("a").AppendField("bc").Finish());
}

TEST(DigestTest, BytesAndHexRoundTrip) {
  const Digest digest = Sha256Of("abc");
  EXPECT_EQ(*Digest::FromBytes(digest.ToBytes()), digest);
  EXPECT_EQ(*Digest::FromHex(digest.ToHex()), digest);
  EXPECT_EQ(digest.ToShortHex(), digest.ToHex().substr(0, 12));
}

TEST(DigestTest, RefusesOtherLengthsAndDigits) {
  EXPECT_FALSE(Digest::FromBytes("").ok());
  EXPECT_FALSE(Digest::FromBytes(std::string(31, 'x')).ok());
  EXPECT_FALSE(Digest::FromBytes(std::string(33, 'x')).ok());
  EXPECT_FALSE(Digest::FromHex("").ok());
  EXPECT_FALSE(Digest::FromHex(std::string(63, 'a')).ok());
  EXPECT_FALSE(Digest::FromHex(std::string(64, 'g')).ok());
  EXPECT_TRUE(Digest::FromHex(std::string(64, 'A')).ok());
}

}  // namespace
}  // namespace pagetide
