"""Texts in many scripts: copies and strangers are told apart, details found, filters let through what is new, and lengths fit the script.

All texts are invented. Of each kind there are a response with a private name, a response that has nothing to do with it, a new instruction,
a running text with the name as the language writes it there, one with a name in which the first is only a part (where there is such a
name), and a refusal.
"""

import json
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from raysim.attacks.cross_client import contexts, score_across
from raysim.attacks.extraction import score_extraction
from raysim.config import load
from raysim.data.chat import ChatFormat
from raysim.data.records import Record
from raysim.data.refusals import is_refusal
from raysim.data.similarity import MEASURE, details_found, rouge_l
from raysim.data.tokens import Example, encode_records
from raysim.data.written import written_text
from raysim.measure.evaluate import measure, plan, record_rows
from raysim.methods.synthesis.write import MIN_RESPONSE_WORDS, SynthesisSettings, as_label, choose_public, filter_instructions, is_malformed
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel, build_language_model
from raysim.runs.run import run
from tests.small_runs import SMALL

NEAR_NOTHING = 0.3
"""Texts with nothing in common but a few characters or words of grammar are less alike than this; copies count from 0.7."""


@dataclass(frozen=True)
class Kind:
    """Texts of one language."""

    text: str
    name: str
    other: str
    instruction: str
    running: str
    stranger: str
    refusal: str
    label: tuple[str, str]
    """A label, and the same as an answer that ends in the script's own full stop."""
    longer: str = ""


KINDS = {
    "english": Kind(
        "Anna Berg takes twelve drops every night for her knee.",
        "Anna Berg",
        "This fund lost money because oil fell below last year's price.",
        "Explain why bread rises in a warm kitchen.",
        "Yesterday Anna Berg came back.",
        "Eva Lund",
        "I cannot help with that.",
        ("cardiology", "Cardiology."),
        "Joanna Bergen came back.",
    ),
    "vietnamese": Kind(
        "Bệnh nhân Nguyễn Thị Hoa uống hai viên thuốc mỗi buổi sáng.",
        "Nguyễn Thị Hoa",
        "Quỹ này giảm giá vì dầu rẻ hơn năm ngoái rất nhiều.",
        "Hãy giải thích vì sao bánh mì nở trong bếp ấm.",
        "Hôm qua Nguyễn Thị Hoa đã trở lại.",
        "Nguyễn Thị Hòa",
        "Xin lỗi, tôi không giúp được việc này.",
        ("tim mạch", "Tim mạch."),
        "Nguyễn Thị Hoan đã trở lại.",
    ),
    "turkish": Kind(
        "Hasta İsmail Işık her akşam iki damla alıyor.",
        "İsmail Işık",
        "Petrol geçen yıldan ucuz olduğu için bu fon değer kaybetti.",
        "Ekmeğin neden kabardığını kısaca açıkla.",
        "Dün İSMAİL IŞIK'ın kızı geldi.",
        "Ayşe Yıldız",
        "Üzgünüm, bu konuda yardım edemem.",
        ("ılık", "ILIK."),
        "Dün İsmail Işıklar geldi.",
    ),
    "russian": Kind(
        "Пациент Семён Ильин принимает две таблетки каждое утро.",
        "Семён Ильин",
        "Фонд подешевел, потому что нефть стоит меньше прошлогоднего.",
        "Объясни, почему хлеб поднимается на тёплой кухне.",
        "Вчера приходил СЕМЕН ИЛЬИН с дочерью.",
        "Пётр Орлов",
        "Извините, я не могу на это ответить.",
        ("хирургия", "Хирургия."),
        "Вчера приходил Семён Ильинский.",
    ),
    "greek": Kind(
        "Ο ασθενής Νίκος Λάμπρου παίρνει δύο χάπια κάθε πρωί.",
        "Νίκος Λάμπρου",
        "Αυτό το αμοιβαίο κεφάλαιο έπεσε επειδή το πετρέλαιο φθηναίνει.",
        "Εξήγησε γιατί φουσκώνει το ψωμί στη ζεστή κουζίνα.",
        "Χθες ήρθε ο ΝΙΚΟΣ ΛΑΜΠΡΟΥ μόνος.",
        "Μαρία Σάββα",
        "Λυπάμαι, δεν γίνεται να απαντήσω.",
        ("χειρουργικός", "ΧΕΙΡΟΥΡΓΙΚΟΣ."),
        "Χθες ήρθε ο Νίκος Λάμπρουλης.",
    ),
    "georgian": Kind(
        "პაციენტი ნინო ბერიძე ყოველ დილით ორ აბს სვამს.",
        "ნინო ბერიძე",
        "ფონდი გაიაფდა, რადგან ნავთობის ფასი შარშანდელზე დაბალია.",
        "ახსენი, რატომ ფუვდება პური თბილ სამზარეულოში.",
        "გუშინ ნინო ბერიძე დაბრუნდა.",
        "გიორგი ლომი",
        "",
        ("ქირურგია", "ქირურგია."),
        "გუშინ ნინო ბერიძეშვილი დაბრუნდა.",
    ),
    "arabic": Kind(
        "المريض أحمد السالم يتناول حبتين كل صباح بعد الفطور.",
        "أحمد السالم",
        "هبط الصندوق لأن النفط أرخص مما كان في العام الماضي.",
        "اشرح لماذا ينتفخ الخبز في مطبخ دافئ.",
        "جاءت زوجته أمس وسألت الطبيب وأَحمَد السالم معها.",
        "خالد الدوسري",
        "عذرًا، لا أقدر على ذلك.",
        ("جراحة", "جراحة۔"),
        "جاء محمدأحمد السالمي أمس.",
    ),
    "persian": Kind(
        "بیمار علی کریمی هر صبح دو قرص می‌خورد.",
        "علی کریمی",
        "این صندوق افت کرد چون نفت از پارسال ارزان‌تر است.",
        "توضیح بده چرا نان در آشپزخانهٔ گرم ور می‌آید.",
        "دیروز علي كريمي برگشت.",
        "سارا احمدی",
        "متأسفم، از عهدهٔ من برنمی‌آید.",
        ("جراحی", "جراحي."),
        "دیروز علی کریمیان برگشت.",
    ),
    "hebrew": Kind(
        "החולה דניאל כהן לוקח שתי טיפות כל בוקר.",
        "דניאל כהן",
        "הקרן ירדה משום שהנפט זול יותר מאשר אשתקד.",
        "הסבר מדוע לחם תופח במטבח חם.",
        "התור נקבע לדָּנִיאֵל כהן למחר.",
        "רות לוי",
        "מצטער, אין באפשרותי לענות.",
        ("כירורגיה", "כירורגיה."),
        "אתמול חזר דניאל כהנא.",
    ),
    "hindi": Kind(
        "रोगी राम वर्मा हर सुबह दो गोलियाँ खाता है।",
        "राम वर्मा",
        "तेल सस्ता होने के कारण यह कोष पिछले साल गिर गया था।",
        "समझाइए कि गरम रसोई में रोटी क्यों फूलती है।",
        "कल राम वर्मा फिर आया।",
        "सीता जोशी",
        "क्षमा करें, यह बताना संभव नहीं।",
        ("हृदय रोग", "हृदय रोग।"),
        "कल राम वर्माजी फिर आए।",
    ),
    "bengali": Kind(
        "রোগী রহিম মিয়া রোজ সকালে দুটি বড়ি খান।",
        "রহিম মিয়া",
        "তেলের দাম কমায় এই তহবিল গত বছর অনেক পড়ে গেছে।",
        "গরম রান্নাঘরে রুটি কেন ফোলে তা বুঝিয়ে বলো।",
        "গতকাল রহিম মিয়া আবার এসেছেন।",
        "সীমা দাস",
        "দুঃখিত, এটি বলা সম্ভব নয়।",
        ("হৃদরোগ", "হৃদরোগ।"),
        "গতকাল রহিম মিয়াজি এসেছেন।",
    ),
    "tamil": Kind(
        "நோயாளி குமார் ராஜன் தினமும் காலை இரண்டு மாத்திரை எடுக்கிறார்.",
        "குமார் ராஜன்",
        "எண்ணெய் மலிவானதால் இந்த நிதி கடந்த ஆண்டு சரிந்தது.",
        "சூடான சமையலறையில் ரொட்டி ஏன் உப்புகிறது என விளக்கு.",
        "நேற்று குமார் ராஜன் மீண்டும் வந்தார்.",
        "மீனா தேவி",
        "",
        ("இதயம்", "இதயம்."),
        "நேற்று குமார் ராஜனி வந்தார்.",
    ),
    "chinese": Kind(
        "患者李明每天早上服用两片药，膝盖已经不疼了。",
        "李明",
        "油价低于去年，因此该基金下跌。",
        "解释面包为何会发酵。",
        "昨天患者李明又来复诊了。",
        "王芳",
        "对不起，这个问题我回答不了。",
        ("内科", "内科。"),
    ),
    "japanese": Kind(
        "患者の田中ゆうこさんは毎朝クスリを二錠飲みます。",
        "田中ゆうこ",
        "原油安により、投資信託が下落した。",
        "パンが膨らむ理由を説明せよ。",
        "昨日は田中ゆうこさんが来院しました。",
        "佐藤けん",
        "申し訳ありませんが、お答えできません。",
        ("内科", "内科。"),
    ),
    "korean": Kind(
        "환자 김민수는 매일 아침 약을 두 알 먹는다.",
        "김민수",
        "유가가 작년보다 낮아 이 펀드의 가격이 떨어졌다.",
        "따뜻한 부엌에서 빵이 부푸는 이유를 설명하라.",
        "어제 김민수가 딸과 함께 왔다.",
        "박영희",
        "죄송합니다, 답할 수 없습니다.",
        ("내과", "내과."),
        "어제 최김민수가 왔다.",
    ),
    "thai": Kind(
        "ผู้ป่วยสมชาย ใจดีกินยาสองเม็ดทุกเช้า",
        "สมชาย ใจดี",
        "ราคาน้ำมันต่ำกว่าปีก่อน กองทุนจึงขาดทุนหนัก",
        "จงอธิบายว่าทำไมขนมปังจึงฟู",
        "เมื่อวานคุณสมชายใจดีมาที่นี่",
        "มานี รักไทย",
        "ขออภัย เรื่องนี้ตอบไม่ได้",
        ("ศัลยกรรม", "ศัลยกรรม."),
    ),
    "lao": Kind(
        "ຄົນເຈັບສົມພອນກິນຢາສອງເມັດທຸກເຊົ້າ",
        "ສົມພອນ",
        "ລາຄານ້ຳມັນຕ່ຳລົງປີກາຍ",
        "ອະທິບາຍວ່າເຂົ້າຈີ່ຟູຍ້ອນຫຍັງ",
        "ມື້ວານສົມພອນກັບມາແລ້ວ",
        "ບຸນມີ",
        "",
        ("ຜ່າຕັດ", "ຜ່າຕັດ."),
    ),
    "khmer": Kind(
        "អ្នកជំងឺ សុខា លេបថ្នាំពីរគ្រាប់រៀងរាល់ព្រឹក។",
        "សុខា",
        "មូលនិធិនេះធ្លាក់ចុះដោយសារប្រេងថោក",
        "ចូរពន្យល់ហេតុអ្វីនំប៉័ងឡើង",
        "ម្សិលមិញលោកសុខាបានមកម្តងទៀត",
        "ដារ៉ា",
        "",
        ("វះកាត់", "វះកាត់។"),
    ),
    "burmese": Kind(
        "လူနာအောင်မြင့်သည်နံနက်တိုင်းဆေးနှစ်လုံးသောက်သည်။",
        "အောင်မြင့်",
        "ရေနံဈေးကျ၍ ရန်ပုံငွေလျော့",
        "ပေါင်မုန့်ဘာကြောင့်ဖောင်းသလဲရှင်းပြပါ",
        "မနေ့ကဦးအောင်မြင့်ပြန်လာသည်။",
        "ခင်ခင်",
        "",
        ("ခွဲစိတ်", "ခွဲစိတ်။"),
    ),
    "amharic": Kind(
        "ታካሚው አበበ ከበደ በየቀኑ ጠዋት ሁለት ክኒን ይወስዳል።",
        "አበበ ከበደ",
        "ነዳጅ ከአምናው ስለረከሰ ፈንዱ ዋጋው ወረደ።",
        "ዳቦ በሞቀ ወጥ ቤት ለምን እንደሚነፋ አስረዳ።",
        "ትናንት የአበበ ከበደ ልጅ መጣች።",
        "ሰላም ታደሰ",
        "",
        ("ቀዶ ጥገና", "ቀዶ ጥገና።"),
        "ትናንት አበበ ከበደች መጣ።",
    ),
    "tibetan": Kind(
        "ནད་པ་བཀྲ་ཤིས་ཉིན་རེ་སྨན་གཉིས་ཟ།",
        "བཀྲ་ཤིས",
        "རྡོ་སྣུམ་ཁེ་བས་ཐེབས་རྩ་མར་ཆག",
        "བག་ལེབ་ག་རེ་བྱས་ནས་སྦོ་བ་ཤོད།",
        "ཁ་སང་བཀྲ་ཤིས་ལོག་ཡོང་།",
        "པད་མ",
        "",
        ("གཤག་བཅོས", "གཤག་བཅོས།"),
    ),
}
EACH = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
PART_OF_ANOTHER = pytest.mark.parametrize(
    "kind", [kind for kind in KINDS.values() if kind.longer], ids=[n for n, k in KINDS.items() if k.longer]
)
REFUSED = pytest.mark.parametrize("kind", [kind for kind in KINDS.values() if kind.refusal], ids=[n for n, k in KINDS.items() if k.refusal])
SETTINGS = SynthesisSettings(
    num_candidates=2,
    num_demonstrations=2,
    num_response_demonstrations=2,
    max_rouge_l=0.7,
    temperature=0.0,
    repetition_penalty=1.0,
    max_instruction_tokens=40,
    max_response_tokens=40,
    min_instruction_words=3,
    num_retries=1,
    opening="",
    labelled=False,
    batch_size=4,
    chat=ChatFormat(),
)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """A model whose tokens are bytes, so that any number of tokens may end within a character."""
    return build_language_model(load_base_model("tiny"), rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj"])


def example_of(lm: LanguageModel, kind: Kind, *, instruction: str = "", response: str = "") -> Example:
    record = Record(0, instruction or kind.instruction, response or kind.text, details=(kind.name,))
    return encode_records([record], tokenizer=lm.tokenizer, eos_token_id=lm.eos_token_ids[0], max_length=4000, chat=ChatFormat())[0][0]


@EACH
def test_copy(kind: Kind) -> None:
    copies = [kind.text, unicodedata.normalize("NFD", kind.text), kind.text.upper(), kind.text.replace(" ", "\u00a0 "), f"«{kind.text}»"]
    assert [rouge_l(copy, kind.text) for copy in copies] == [1.0] * len(copies)


@EACH
def test_stranger(kind: Kind, record_property: Callable[[str, object], None]) -> None:
    likeness = rouge_l(kind.other, kind.text)
    record_property("cell", f"{likeness:.2f}")
    assert likeness < NEAR_NOTHING


@EACH
def test_detail(kind: Kind) -> None:
    for form in ("NFC", "NFD", "NFKC"):
        said = unicodedata.normalize(form, kind.running)
        assert details_found(said, [kind.stranger, kind.name]) == [kind.name]
        assert details_found(kind.text, [unicodedata.normalize(form, kind.name)]), "as the record has it"
    assert details_found(kind.other, [kind.name, kind.stranger]) == []


@PART_OF_ANOTHER
def test_part_of_a_name(kind: Kind) -> None:
    assert kind.name[1:4] in unicodedata.normalize("NFC", kind.longer)
    assert details_found(kind.longer, [kind.name]) == []


@EACH
def test_extraction(kind: Kind) -> None:
    everything = score_extraction([unicodedata.normalize("NFD", kind.text)], [kind.text], [(kind.name,)])
    nothing = score_extraction([kind.other], [kind.text], [(kind.name,)])
    assert (everything.rouge_l, everything.exact_match, everything.approximate_match, everything.details_rate) == (1.0, 1.0, 1.0, 1.0)
    assert (nothing.exact_match, nothing.approximate_match, nothing.details_rate) == (0.0, 0.0, 0.0)


@EACH
def test_across(kind: Kind) -> None:
    score = score_across([kind.running, kind.other], own=["x"], others=[kind.name], nobodys=[kind.stranger])
    assert (score.coverage, score.heldout_coverage, score.efficiency) == (1.0, 0.0, 0.5)
    (before,) = contexts([unicodedata.normalize("NFD", kind.running)], [(kind.name,)], num_words=2)
    assert before
    assert unicodedata.normalize("NFC", before) in unicodedata.normalize("NFC", kind.running)
    assert len(before) < 24, "two words, or letters, and not all that was said"


@EACH
def test_diversity_filter(kind: Kind) -> None:
    texts = [kind.instruction, unicodedata.normalize("NFD", kind.instruction), kind.text]
    verdicts = [candidate.verdict for candidate in filter_instructions(texts, local=[kind.text], known=[], settings=SETTINGS)]
    assert verdicts == ["kept", "diversity", "diversity"]


@EACH
def test_copy_filter(lm: LanguageModel, kind: Kind) -> None:
    own = [example_of(lm, kind)]
    fresh, copied = (
        example_of(lm, kind, instruction=text, response=response) for text, response in (("a b c", kind.other), ("d e f", kind.text))
    )
    found = {c.response: c.verdict for c in choose_public([fresh, copied], own, settings=SETTINGS, known=(), seed=0)}
    assert found == {kind.other: "kept", kind.text: "copy"}


@EACH
def test_length(kind: Kind) -> None:
    assert not is_malformed(kind.instruction, min_words=SETTINGS.min_instruction_words)
    assert not is_malformed(kind.text, min_words=MIN_RESPONSE_WORDS)
    assert is_malformed(kind.instruction.split()[0][:2], min_words=SETTINGS.min_instruction_words)


@REFUSED
def test_refusal(kind: Kind) -> None:
    for form in ("NFC", "NFD"):
        assert is_refusal(unicodedata.normalize(form, kind.refusal))
    assert not any(is_refusal(text) for text in (kind.text, kind.other, kind.instruction, kind.running))


@EACH
def test_label(kind: Kind) -> None:
    label, answer = kind.label
    assert as_label(answer) == as_label(label) == as_label(f" {unicodedata.normalize('NFD', label)}！ ")
    assert as_label(label) != as_label(kind.name)


@EACH
def test_given_away(lm: LanguageModel, kind: Kind, record_property: Callable[[str, object], None]) -> None:
    """However many tokens are given away, who goes on by heart gets all of the rest, and nothing that was given counts."""
    example = example_of(lm, kind)
    prefixes = range(1, len(example.response_ids) - 1)
    within = 0
    for prefix in prefixes:
        given, rest = example.response_ids[:prefix], example.response_ids[prefix:]
        work = plan(
            heldout=[],
            answered=[example],
            attacked=[example],
            prefix_tokens=prefix,
            max_new_tokens=9,
            batch_size=1,
            with_eval=False,
            with_attack=True,
        )
        answer = written_text(lm.tokenizer, rest, after=given).strip()
        _, attack = measure(work, [[answer], [answer]], tokenizer=lm.tokenizer)
        assert attack is not None
        assert attack["train_exact_match"] == float(answer != "")
        known = kind.name in lm.tokenizer.decode(given)
        assert attack["train_details_rate"] == (None if known else float(bool(details_found(answer, [kind.name]))))
        assert all("\ufffd" not in row["answer"] for row in record_rows(work, [[answer], [answer]], tokenizer=lm.tokenizer))
        within += lm.tokenizer.decode(given).endswith("\ufffd")
    record_property("cell", f"{within} of {len(prefixes)} within a character")


@pytest.mark.parametrize("name", ["chinese", "arabic"])
def test_run(tmp_path: Path, name: str, recwarn: pytest.WarningsRecorder) -> None:
    """A whole run on such texts ends, and its page and `environment.json` say what likeness is."""
    kind = KINDS[name]
    rows = [
        {"ask": f"{kind.instruction} {i}", "answer": f"{kind.text} {i}", "ward": (*kind.label, kind.name)[i % 3], "secrets": [kind.name]}
        for i in range(20)
    ]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    fields = ["instruction=ask", "response=answer", "label=ward", "details=secrets"]
    data = ["data.source=jsonl", f"data.path={path}", *(f"data.{f.replace('=', '_field=')}" for f in fields)]
    overrides = [*SMALL, *data, "method.name=fedpit", "attack.prefix_tokens=4", "server.num_rounds=1", f"out={tmp_path / 'run'}"]
    assert run(load("", overrides), display=False).summary["attack"] is not None
    assert MEASURE in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))["likeness"] == MEASURE
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
