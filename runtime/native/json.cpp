#include "json.hpp"

#include <cmath>
#include <locale>
#include <sstream>

namespace darcnn {
namespace {

// Paths hold their parents' names, so that they bound memory and depth: a manifest's have some 30 characters.
constexpr std::size_t kMaxPath = 300, kMaxValues = 10000;

class Parser {
  public:
    explicit Parser(std::string_view text) : text_(text) {}

    JsonTable parse() {
        parse_value("");
        skip_space();
        if (at_ != text_.size()) fail("goes on after its end");
        return std::move(table_);
    }

  private:
    [[noreturn]] void fail(const char *problem) const {
        throw JsonError(std::string("is not JSON, it ") + problem + " at byte " + std::to_string(at_));
    }

    char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

    bool accept(char c) {
        return at_ < text_.size() && text_[at_] == c && ++at_;
    }

    void expect(std::string_view word) {
        if (text_.substr(at_, word.size()) != word) fail("is not as it should be");
        at_ += word.size();
    }

    void skip_space() {
        while (accept(' ') || accept('\t') || accept('\r') || accept('\n')) continue;
    }

    void parse_value(const std::string &path) {
        if (path.size() > kMaxPath || table_.size() > kMaxValues) fail("is larger or nests deeper than a manifest");
        skip_space();
        const auto [place, is_new] = table_.try_emplace(path);
        if (!is_new) fail("has a name twice");
        Json &value = place->second;
        switch (peek()) {
            case '{': parse_items(value, Json::Kind::object, path); break;
            case '[': parse_items(value, Json::Kind::array, path); break;
            case '"': value.kind = Json::Kind::text, value.text = parse_text(); break;
            case 't': expect("true"), value.kind = Json::Kind::boolean, value.number = 1; break;
            case 'f': expect("false"), value.kind = Json::Kind::boolean; break;
            case 'n': expect("null"); break;
            default: parse_number(value);
        }
    }

    void parse_items(Json &value, Json::Kind kind, const std::string &path) {
        value.kind = kind;
        const char end = text_[at_++] == '{' ? '}' : ']';
        skip_space();
        if (accept(end)) return;
        do {
            std::string name = std::to_string(static_cast<int>(value.number));
            if (kind == Json::Kind::object) {
                skip_space();
                name = parse_text();
                if (name.find('/') != std::string::npos) fail("has a name with a slash");
                skip_space();
                expect(":");
            }
            parse_value(path.empty() ? name : path + "/" + name);
            value.number += 1;
            skip_space();
        } while (accept(','));
        expect({&end, 1});
    }

    std::size_t skip_digits() {
        const std::size_t start = at_;
        while (peek() >= '0' && peek() <= '9') ++at_;
        if (at_ == start) fail("has no number where one should be");
        return at_ - start;
    }

    void parse_number(Json &value) {
        const std::size_t start = at_;
        accept('-');
        const bool has_zero = peek() == '0';
        if (skip_digits() > 1 && has_zero) fail("has a number with a leading zero");
        value.kind = Json::Kind::number, value.is_integer = true;
        if (accept('.')) value.is_integer = false, skip_digits();
        if (accept('e') || accept('E')) {
            value.is_integer = false;
            if (!accept('+')) accept('-');
            skip_digits();
        }
        std::istringstream stream{std::string(text_.substr(start, at_ - start))};
        stream.imbue(std::locale::classic());  // the program's own locale may write a comma
        if (!(stream >> value.number) || !std::isfinite(value.number)) fail("has a number out of range");
    }

    std::string parse_text() {
        static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
        std::string found;
        expect("\"");
        while (!accept('"')) {
            if (at_ == text_.size() || static_cast<unsigned char>(text_[at_]) < 0x20) fail("has a string that does not end");
            if (!accept('\\')) {
                found += text_[at_++];
            } else {  // \u is not known: darcnn-export writes UTF-8
                const std::size_t place = kFrom.find(peek());
                if (place == std::string_view::npos) fail("has an unknown escape");
                found += kTo[place], ++at_;
            }
        }
        return found;
    }

    std::string_view text_;
    std::size_t at_ = 0;
    JsonTable table_;
};

}  // namespace

JsonTable parse_json(std::string_view text) { return Parser(text).parse(); }

}  // namespace darcnn
